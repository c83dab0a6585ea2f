package images

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

// Auth is what a registry wants to see; the fields are those of the CRI's
// AuthConfig. The zero value is anonymous.
type Auth struct {
	Username, Password string
	// Auth is base64 of "username:password".
	Auth string
	// ServerAddress limits the credentials to one registry, if set.
	ServerAddress string
	// IdentityToken is an OAuth2 refresh token.
	IdentityToken string
	// RegistryToken is a bearer token that is sent as it is.
	RegistryToken string
}

// credentials answers user and secret for a registry host; an empty user with
// a secret means a refresh token (containerd's convention).
func (a Auth) credentials(host string) (user, secret string, err error) {
	if !a.appliesTo(host) {
		return "", "", nil
	}
	switch {
	case a.Username != "":
		return a.Username, a.Password, nil
	case a.IdentityToken != "":
		return "", a.IdentityToken, nil
	case a.Auth != "":
		raw, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return "", "", fmt.Errorf("decode registry credentials: %s: %w", err, errdefs.ErrInvalidArgument)
		}
		user, secret, ok := strings.Cut(string(raw), ":")
		if !ok {
			return "", "", fmt.Errorf("decode registry credentials: no colon between user and password: %w", errdefs.ErrInvalidArgument)
		}
		return user, strings.TrimRight(secret, "\x00"), nil
	}
	return "", "", nil
}

// appliesTo reports whether the credentials may be sent to host.
func (a Auth) appliesTo(host string) bool {
	return a.ServerAddress == "" || registryHost(a.ServerAddress) == registryHost(host)
}

// registryHost reduces "https://index.docker.io/v1/" and the like to a host,
// with one spelling for Docker Hub.
func registryHost(address string) string {
	if _, rest, ok := strings.Cut(address, "://"); ok {
		address = rest
	}
	host, _, _ := strings.Cut(address, "/")
	switch host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}

// tokenAuthorizer sends one bearer token and does not negotiate.
type tokenAuthorizer struct{ token string }

var _ docker.Authorizer = tokenAuthorizer{}

func (t tokenAuthorizer) Authorize(_ context.Context, req *http.Request) error {
	req.Header.Set("Authorization", "Bearer "+t.token)
	return nil
}

func (tokenAuthorizer) AddResponses(_ context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	return fmt.Errorf("the registry token was not accepted (%s): %w", last.Status, errdefs.ErrPermissionDenied)
}
