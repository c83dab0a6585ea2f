package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// etcdSocket is relative to the working directory, the control plane's own: the
// absolute path of a test's directory may be longer than a socket's may be.
const etcdSocket = "etcd.sock"

const etcdStart = time.Minute

// startEtcd serves the data in the folder etcd on unix sockets.
func startEtcd(ctx context.Context) (*embed.Etcd, error) {
	cfg := embed.NewConfig()
	cfg.Dir = "etcd"
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Host: etcdSocket}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: "etcd-peer.sock"}}
	cfg.AdvertisePeerUrls = cfg.ListenPeerUrls
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.LogLevel = "warn"
	cfg.LogOutputs = []string{"etcd.log"}
	cfg.UnsafeNoFsync = true // data outlives the process, not a crash of the host
	etcd, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start etcd (see etcd.log): %w", err)
	}
	select {
	case <-etcd.Server.ReadyNotify():
		return etcd, nil
	case err := <-etcd.Err():
		return nil, fmt.Errorf("etcd (see etcd.log): %w", err)
	case <-ctx.Done():
		etcd.Close()
		return nil, ctx.Err()
	case <-time.After(etcdStart):
		etcd.Close()
		return nil, errors.New("etcd was not ready within a minute; see etcd.log")
	}
}
