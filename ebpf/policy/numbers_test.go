package policy

import "testing"

func TestNumbersRestBeforeTheyComeBack(t *testing.T) {
	n := numbers[uint16]{next: 3, limit: 5}
	a, _ := n.take()
	b, _ := n.take()
	if a != 3 || b != 4 {
		t.Fatal(a, b)
	}
	n.drop(a)
	if id, ok := n.take(); ok || !n.full {
		t.Fatalf("%d is given before its grace period is over", id)
	}
	n.graced()
	if id, ok := n.take(); !ok || id != a {
		t.Fatal(id, ok)
	}
}
