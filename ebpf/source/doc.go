// Package source tells the policy engine what objects there are: from a watched
// directory of YAML (Dir) or from an API server (API).
//
// Both hand over slim copies: labels, addresses, named ports, and policies. It
// decides nothing about policy, and it never tells an empty state because one
// could not be read: until the first complete one it tells nothing, and what
// was told stays until it is known to have changed. Engine calls Run and ends
// it. Any kernel.
package source
