//go:build linux

package ebpf

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nodeagent/nodeagent/ebpf/datapath"
	"github.com/nodeagent/nodeagent/ebpf/objects"
)

// TestRoomComesBack: a pod whose rows have no room is denied, and told; when
// another's have gone the engine gives it rows by itself, written as they should
// be, while no object changes.
func TestRoomComesBack(t *testing.T) {
	if !alone(t) {
		return
	}
	s := newSite(t)
	s.start(Config{Datapath: datapath.Config{RowBlocks: 4}}) // two pods, a block for each direction
	defer func() { s.stop() }()
	s.objects = objects.Lists{Namespaces: []objects.Namespace{{Name: "ns"}}, Policies: policies(t, `
podSelector: {}
ingress: [{from: [{ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: "2001:db8::/64"}}]}]`)}
	s.ready("a", "b", "c")
	problems := func() []string {
		t.Helper()
		st, err := s.engine.Status(t.Context())
		must(t, err)
		return st.Problems
	}
	var denied int
	list := problems()
	if _, err := fmt.Sscanf(strings.Join(list, ""), "endpoint %d: no room", &denied); err != nil || denied < 1 || denied > 3 {
		t.Fatalf("problems %q: %v", list, err)
	}
	names := []string{"a", "b", "c"} // their endpoints are 1, 2, 3
	poor, rich, other := names[denied-1], names[denied%3], names[(denied+1)%3]
	s.table("no room for one", fmt.Sprintf("x %s no\nx %s yes\nx %s yes", poor, rich, other))
	must(t, s.engine.PodGone(t.Context(), "sb-"+rich))
	for end := time.Now().Add(60 * time.Second); len(problems()) > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still without room: %q", problems())
		}
	}
	s.table("there is room", fmt.Sprintf("x %s yes\nx %s yes\n%s %s no", poor, other, other, poor))
}
