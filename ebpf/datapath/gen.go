package datapath

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -tags linux -target bpfel -cc clang-14 -cflags "-O2 -g -mcpu=v3 -Wall -Wno-unused-function -Werror" na bpf/policy.bpf.c
