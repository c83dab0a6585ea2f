package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/nodeagent/nodeagent/cri/images"
)

// callAdmin sends req to the admin socket and calls report with each progress
// until the outcome has come. Cancelling ctx cancels the work in the daemon.
func callAdmin(ctx context.Context, socket, path string, req any, report func(images.Progress)) ([]adminImage, error) {
	body, err := postAdmin(ctx, socket, path, req)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return readEvents(body, report)
}

// postAdmin sends req to the admin socket and returns what is answered; the
// caller closes it.
func postAdmin(ctx context.Context, socket, path string, req any) (io.ReadCloser, error) {
	data, err := json.Marshal(req)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	post, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://admin"+path, bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	resp, err := transport.RoundTrip(post)
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EACCES):
		return nil, noDaemon(socket)
	case err != nil:
		return nil, fmt.Errorf("ask the daemon: %w", err)
	case resp.StatusCode != http.StatusOK:
		defer resp.Body.Close()
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return nil, fmt.Errorf("the daemon refuses: %s", strings.TrimSpace(string(why)))
	}
	return resp.Body, nil
}

func readEvents(r io.Reader, report func(images.Progress)) ([]adminImage, error) {
	dec := json.NewDecoder(r)
	for {
		var e adminEvent
		if err := dec.Decode(&e); err != nil {
			return nil, fmt.Errorf("the daemon's answer broke off: %w", err)
		}
		switch {
		case e.Error != "":
			return nil, errors.New(e.Error)
		case e.Progress != nil:
			report(*e.Progress)
		default:
			return e.Images, nil
		}
	}
}
