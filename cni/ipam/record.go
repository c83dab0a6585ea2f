package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
)

// recordVersion is the version of the address files. A file of another version is kept and
// its address is never given out.
const recordVersion = 1

// maxRecord bounds what is read from an address file, in bytes.
const maxRecord = 64 << 10

// Owner says for whom an address is held.
type Owner struct {
	Network string `json:"network"` // instance or CNI network name: only it may release the address
	Sandbox string `json:"sandbox"`
	IfName  string `json:"ifname"`
	Netns   string `json:"netns,omitempty"`
}

// Record is the content of one address file.
type Record struct {
	Version int        `json:"version"`
	Addr    netip.Addr `json:"addr"`
	Owner
}

// Encode is the content of the file of r.
func (r Record) Encode() ([]byte, error) { return json.Marshal(r) }

// Decode reads the content of the address file called name.
//
// Errors: DataLoss if it is not a record of that address, FailedPrecondition if it is a
// record of a version this program does not know.
func Decode(name string, p []byte) (Record, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(p, &head); err != nil {
		return Record{}, fmt.Errorf("decode address record %q: %w: %w", name, err, errdefs.ErrDataLoss)
	}
	if head.Version <= 0 {
		return Record{}, fmt.Errorf("decode address record %q: no version: %w", name, errdefs.ErrDataLoss)
	}
	if head.Version != recordVersion {
		return Record{}, fmt.Errorf("decode address record %q: version %d, this program knows %d: %w",
			name, head.Version, recordVersion, errdefs.ErrFailedPrecondition)
	}
	var r Record
	if err := json.Unmarshal(p, &r); err != nil {
		return Record{}, fmt.Errorf("decode address record %q: %w: %w", name, err, errdefs.ErrDataLoss)
	}
	if !r.Addr.IsValid() || r.Addr.String() != name {
		return Record{}, fmt.Errorf("decode address record %q: holds address %s: %w", name, r.Addr, errdefs.ErrDataLoss)
	}
	if r.Sandbox == "" || r.Network == "" {
		return Record{}, fmt.Errorf("decode address record %q: no owner: %w", name, errdefs.ErrDataLoss)
	}
	return r, nil
}
