//go:build race

package cgroups

// raceDetector: with it sync.Pool drops things at random.
const raceDetector = true
