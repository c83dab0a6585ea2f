//go:build race

package cgroups

// With the race detector sync.Pool drops things at random.
func init() { raceDetector = true }
