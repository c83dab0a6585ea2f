package criolog

import "sync"

// buffer is the scratch space of one write; out grows a little over outLimit.
type buffer struct {
	in  []byte
	out []byte
}

// bufferPool shares scratch space among all logs of the process: as many
// buffers exist as logs are written at the same moment, and the garbage
// collector takes them back in quiet times.
type bufferPool struct{ sync.Pool }

func (p *bufferPool) get() *buffer {
	if b, ok := p.Get().(*buffer); ok {
		return b
	}
	return &buffer{in: make([]byte, chunk), out: make([]byte, 0, outLimit)}
}

func (p *bufferPool) put(b *buffer) {
	if cap(b.out) <= 4*outLimit {
		p.Put(b)
	}
}

var buffers bufferPool
