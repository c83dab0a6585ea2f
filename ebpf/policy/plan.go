package policy

import "net/netip"

// Plan is one change of the tables. Its parts must reach the kernel in the
// order of the fields, each part wholly before the next:
//
//   - cells of classes that no address has yet, and rows of endpoints that were
//     not isolated, change no verdict;
//   - cells of classes that no address leaves go from the old verdict to the new;
//   - an address goes from its old class, whose cells still hold the old
//     verdict, to its new one, whose cells hold the new;
//   - only when no packet can still know its old class do that class's cells
//     change for those that stay.
//
// An entry to be removed is moved first to the class that it falls to.
type Plan struct {
	Bank     *Bank                       // a new port table, with all of Profiles; nil: the present one stays
	Profiles map[uint16][BitmapSize]byte // bitmaps to write before any row names them
	Classes  uint32                      // class numbers in rows are below this
	Gone     []uint32                    // endpoints that were deleted
	Prepare  []RowWrite
	Words    []EndpointWord
	Early    []RowWrite
	Exact    []Address
	Prefixes []Prefix // longest first
	Own      []OwnClass
	Grace    bool // wait until no packet can know a class it looked up before
	Late     []RowWrite

	DeleteExact    []netip.Addr
	DeletePrefixes []netip.Prefix

	// Retired says that numbers wait for a grace period and Graced.
	Retired bool
	// Problems are limits that were met: something is denied that should not be.
	Problems []string
}

// Empty says that nothing is to be written.
func (p *Plan) Empty() bool {
	return p.Bank == nil && len(p.Profiles)+len(p.Gone)+len(p.Prepare)+len(p.Words)+len(p.Early)+len(p.Exact)+len(p.Prefixes)+
		len(p.Own)+len(p.Late)+len(p.DeleteExact)+len(p.DeletePrefixes) == 0
}

// RowWrite sets cells of one row.
type RowWrite struct {
	Endpoint uint32
	Dir      Dir
	Blank    bool // the row is not read: clear all of it first
	Cells    []Cell
}

// Cell is the profile that a class has in a row.
type Cell struct {
	Class   uint32
	Profile uint16
}

// Word is an endpoint's state that changes at once.
type Word struct {
	Active   bool // its rows are live; until then nothing passes
	Isolated [2]bool
	Audit    bool // judged but not enforced
}

// EndpointWord publishes a Word.
type EndpointWord struct {
	Endpoint uint32
	Word     Word
}

// Address gives an address a class.
type Address struct {
	Addr  netip.Addr
	Class uint32
	Node  bool // one of this node's: a local pod may hide behind it
}

// Prefix gives a prefix a class.
type Prefix struct {
	Prefix netip.Prefix
	Class  uint32
}

// OwnClass tells an endpoint the class that its own address has.
type OwnClass struct {
	Endpoint uint32
	Addr     netip.Addr
	Class    uint32
}
