package images

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// Push uploads an artifact to "host:port/repository:tag" by the registry
// protocol over plain http, with basic authentication if user is not empty.
// Blobs that the registry has are not sent again.
func Push(ctx context.Context, ref string, a Artifact, userPassword ...string) error {
	host, rest, ok := strings.Cut(ref, "/")
	if !ok {
		return fmt.Errorf("push %q: no registry host", ref)
	}
	repo, tag := rest, "latest"
	if i := strings.LastIndex(rest, ":"); i >= 0 {
		repo, tag = rest[:i], rest[i+1:]
	}
	p := pusher{base: "http://" + host + "/v2/" + repo, login: userPassword}
	for _, b := range a.Blobs() {
		if err := p.blob(ctx, b); err != nil {
			return fmt.Errorf("push %q: blob %s: %w", ref, b.Desc.Digest, err)
		}
	}
	manifests := a.Manifests()
	for i, m := range manifests {
		name := m.Desc.Digest.String()
		if i == len(manifests)-1 {
			name = tag
		}
		if err := p.manifest(ctx, name, m); err != nil {
			return fmt.Errorf("push %q: manifest %s: %w", ref, m.Desc.Digest, err)
		}
	}
	return nil
}

type pusher struct {
	base  string
	login []string
}

func (p pusher) do(ctx context.Context, method, url, mediaType string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	if len(p.login) == 2 {
		req.SetBasicAuth(p.login[0], p.login[1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= 300 && method != http.MethodHead {
		return nil, fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, text)
	}
	return resp, nil
}

func (p pusher) blob(ctx context.Context, b Blob) error {
	head, err := p.do(ctx, http.MethodHead, p.base+"/blobs/"+b.Desc.Digest.String(), "", nil)
	if err != nil {
		return err
	}
	if head.StatusCode == http.StatusOK {
		return nil
	}
	start, err := p.do(ctx, http.MethodPost, p.base+"/blobs/uploads/", "", nil)
	if err != nil {
		return err
	}
	loc, err := start.Location()
	if err != nil {
		return err
	}
	q := loc.Query()
	q.Set("digest", b.Desc.Digest.String())
	loc.RawQuery = q.Encode()
	_, err = p.do(ctx, http.MethodPut, loc.String(), "application/octet-stream", b.Data)
	return err
}

func (p pusher) manifest(ctx context.Context, name string, m Blob) error {
	_, err := p.do(ctx, http.MethodPut, p.base+"/manifests/"+url.PathEscape(name), m.Desc.MediaType, m.Data)
	return err
}
