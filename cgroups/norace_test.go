//go:build !race

package cgroups

const raceDetector = false
