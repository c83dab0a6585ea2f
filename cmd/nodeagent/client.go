package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// maxCRIMessage is what kubelet and crictl allow for one answer, in bytes.
const maxCRIMessage = 16 << 20

// dialCRI prepares a connection to the CRI server on a unix socket. It does
// not connect yet.
func dialCRI(socket string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxCRIMessage)))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", socket, err)
	}
	return conn, nil
}

// withCRI calls f with a connection to the configured daemon's CRI.
func (a *app) withCRI(f func(*grpc.ClientConn) error) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	conn, err := dialCRI(cfg.CRI.Socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	return plain(f(conn), cfg.CRI.Socket)
}

// plain turns a gRPC error into the one line that a person wants.
func plain(err error, socket string) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	if s.Code() == codes.Unavailable {
		return noDaemon(socket)
	}
	return errors.New(s.Message())
}

func noDaemon(socket string) error {
	if errors.Is(unix.Access(socket, unix.W_OK), unix.EACCES) {
		return fmt.Errorf("only root may use %s: run with sudo", socket)
	}
	return fmt.Errorf("no daemon answers on %s: start it with %q, or name its configuration with --config", socket, "nodeagent run")
}
