//go:build linux && cgo && seccomp

package seccomp

// #include "wrap.h"
import "C"

// hits is how many programs this process took from the table; tests ask.
func hits() int { return int(C.na_seccomp_hits()) }
