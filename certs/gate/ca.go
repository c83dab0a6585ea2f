package gate

import (
	"crypto/x509"
	"fmt"
	"os"
	"sync"
	"time"
)

// CAFile is a file of CA certificates that may change: it is read again when
// its time or size differ. While it cannot be read the last content counts.
type CAFile struct {
	path string

	mu   sync.Mutex
	pool *x509.CertPool // guarded by mu
	time time.Time      // guarded by mu, of the file
	size int64          // guarded by mu
}

// NewCAFile reads nothing yet.
func NewCAFile(path string) *CAFile { return &CAFile{path: path} }

// Pool is the CAs of now; with an error it is those of before, or nil.
func (c *CAFile) Pool() (*x509.CertPool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st, err := os.Stat(c.path)
	if err != nil {
		return c.pool, fmt.Errorf("read CA of client certificates: %w", err)
	}
	if c.pool != nil && st.ModTime().Equal(c.time) && st.Size() == c.size {
		return c.pool, nil
	}
	data, err := os.ReadFile(c.path)
	if err != nil {
		return c.pool, fmt.Errorf("read CA of client certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return c.pool, fmt.Errorf("read CA of client certificates: no certificate in %s", c.path)
	}
	c.pool, c.time, c.size = pool, st.ModTime(), st.Size()
	return pool, nil
}
