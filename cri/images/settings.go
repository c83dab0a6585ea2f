package images

import (
	"cmp"
	"time"
)

// Settings are what of a Config may be changed while the store is open.
type Settings struct {
	// RegistryConfigDirs are searched in order for <host>/hosts.toml.
	RegistryConfigDirs []string
	// MaxParallelDownloads bounds the layers in transfer per pull (0: 3, as
	// containerd).
	MaxParallelDownloads int
	// ProgressTimeout ends a pull whose registry sends nothing (0: 1 minute).
	ProgressTimeout time.Duration
	// Pinned are glob patterns of names that are reported as pinned.
	Pinned []string
}

// settings are Settings in the form in which they are used. They are replaced,
// never changed.
type settings struct {
	Settings
	pins *pinSet
}

// Configure replaces the settings. Pulls in flight go on with the former ones.
//
// Errors: InvalidArgument for a pattern of pinned images; nothing is changed.
func (s *Store) Configure(o Settings) error {
	pins, err := newPinSet(o.Pinned)
	if err != nil {
		return err
	}
	o.MaxParallelDownloads = cmp.Or(o.MaxParallelDownloads, 3)
	o.ProgressTimeout = cmp.Or(o.ProgressTimeout, time.Minute)
	s.live.Store(&settings{o, pins})
	return nil
}
