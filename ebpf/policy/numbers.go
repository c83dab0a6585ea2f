package policy

// numbers gives out numbers below limit. One that was dropped is given again
// only when a grace period has passed: a packet may still hold it.
type numbers[N uint16 | uint32] struct {
	free, limbo []N
	next, limit N    // next: the lowest that was never given
	full        bool // there was none left, since full was last cleared
}

func (n *numbers[N]) take() (N, bool) {
	if k := len(n.free); k > 0 {
		id := n.free[k-1]
		n.free = n.free[:k-1]
		return id, true
	}
	if n.next >= n.limit {
		n.full = true
		return 0, false
	}
	n.next++
	return n.next - 1, true
}

func (n *numbers[N]) drop(id N) { n.limbo = append(n.limbo, id) }

func (n *numbers[N]) graced() {
	n.free = append(n.free, n.limbo...)
	n.limbo = nil
}
