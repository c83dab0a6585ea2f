package images

import (
	"context"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
)

// registryHosts tells where to find a registry, reading hosts.toml (or Docker's
// certificate files) anew each time: the first directory that has an entry for
// the host decides. Loopback registries are tried with TLS and then without.
func (s *Store) registryHosts(ctx context.Context, auth Auth, origin string, dog *watchdog) docker.RegistryHosts {
	lookup := config.ConfigureHosts(ctx, config.HostOptions{
		HostDir:      s.hostDir,
		Credentials:  auth.credentials,
		UpdateClient: dog.watch,
	})
	return func(host string) ([]docker.RegistryHost, error) {
		hosts, err := lookup(host)
		if err != nil || auth.RegistryToken == "" {
			return hosts, err
		}
		for i := range hosts {
			// The token belongs to the registry the image is named after,
			// not to its mirrors.
			if registryHost(hosts[i].Host) == registryHost(origin) && auth.appliesTo(hosts[i].Host) {
				hosts[i].Authorizer = tokenAuthorizer{auth.RegistryToken}
			}
		}
		return hosts, nil
	}
}

func (s *Store) hostDir(host string) (string, error) {
	for _, root := range s.live.Load().RegistryConfigDirs {
		dir, err := config.HostDirFromRoot(root)(host)
		if err == nil && dir != "" {
			return dir, nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return "", err
		}
	}
	return "", errdefs.ErrNotFound
}
