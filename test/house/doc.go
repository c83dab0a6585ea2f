// Package house holds the rules of this repository as tests: what a package
// may import and must say, what code must not do, what files must not hold.
// The rules that need a choice are data at the top of rules_test.go; change
// them there, with a reason, when a rule is wrong.
//
// It must not test behaviour. It needs the go command and git, no root.
package house
