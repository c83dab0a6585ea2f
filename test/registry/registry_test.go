package registry

import (
	"io"
	"net/http"
	"regexp"
	"testing"

	"github.com/nodeagent/nodeagent/test/images"
)

func TestRangesAndFaults(t *testing.T) {
	s, err := Start(Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	img, err := images.Build(images.Config{}, images.File("f", "x"))
	if err != nil {
		t.Fatal(err)
	}
	if err := images.Push(t.Context(), s.Addr+"/a/b:c", img); err != nil {
		t.Fatal(err)
	}
	url := "http://" + s.Addr + "/v2/a/b/blobs/" + img.Layers[0].Desc.Digest.String()
	// Without this the client tries again by itself when a connection drops.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(ranges string) (int, string, error) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if ranges != "" {
			req.Header.Set("Range", ranges)
		}
		resp, err := client.Do(req)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b), err
	}
	whole := string(img.Layers[0].Data)
	if code, body, err := get(""); code != 200 || body != whole || err != nil {
		t.Errorf("whole: %d %v", code, err)
	}
	if code, body, err := get("bytes=10-"); code != 206 || body != whole[10:] || err != nil {
		t.Errorf("open range: %d %v", code, err)
	}
	blobs := regexp.MustCompile("/blobs/")
	s.Inject(Fault{Path: blobs, Drop: true, Times: 1})
	if _, _, err := get(""); err == nil {
		t.Error("not dropped")
	}
	s.Inject(Fault{Path: blobs, DropAfter: 20})
	if _, body, err := get(""); err == nil || body != whole[:20] {
		t.Errorf("dropped after %d bytes, %v", len(body), err)
	}
	s.Heal()
	s.Inject(Fault{Path: blobs, Corrupt: true})
	if _, body, err := get(""); err != nil || body == whole || len(body) != len(whole) {
		t.Errorf("not corrupted: %v", err)
	}
	if s.Requests("GET", "/blobs/") != 5 {
		t.Errorf("%d requests counted", s.Requests("GET", "/blobs/"))
	}
}
