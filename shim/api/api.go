// Package api is the generated ttrpc interface between the daemon's shim
// client (package shim) and the nodeagent-shim process (package shim/server).
// It must hold nothing but generated code. To regenerate: protoc 3.21 with
// protoc-gen-go and protoc-gen-go-ttrpc of the versions in go.mod.
package api

//go:generate protoc -I . --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative shim.proto
