package main

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"syscall"

	"github.com/spf13/cobra"
)

// newHoldCommand is a process that does nothing until its input ends; `check`
// holds namespaces with it.
func newHoldCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "hold",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := io.Copy(io.Discard, cmd.InOrStdin())
			return err
		},
	}
}

// holdUserNamespace starts a process in a user namespace of its own that maps
// 65536 ids from 100000 up.
func holdUserNamespace() (path string, release func(), err error) {
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
	cmd := exec.Command("/proc/self/exe", "hold")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: ids,
		GidMappings: ids,
		Credential:  &syscall.Credential{Uid: 0, Gid: 0, NoSetGroups: true},
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		stdin.Close()
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EUSERS) {
			return "", nil, fmt.Errorf("user.max_user_namespaces is reached: %w", err)
		}
		return "", nil, err
	}
	release = func() {
		stdin.Close()
		cmd.Wait()
	}
	return fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid), release, nil
}
