package criolog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// state is the one record of log.state: what is consumed of each spool, and
// the write to the log that may be under way. It is written in place with one
// pwrite of recordSize bytes inside one page, which a kill cannot tear.
type state struct {
	dev, ino uint64 // of the log that the write goes to
	size     int64  // of the log before the write, bytes
	expect   int64  // bytes that the write adds; 0: none under way
	at       int64  // batch.at of the write
	stream   Stream // whose lines they are
	pos      [streams]position
}

// position is what is done of one stream's active spool, in bytes. A write is
// under way for [from, to) of the stream named in state.
type position struct {
	active   uint8 // which of the two spool files
	from, to int64
}

const (
	recordMagic   = 0x676f6c63 // "clog"
	recordVersion = 1
	recordSize    = 4 + 4 + 5*8 + 8 + int(streams)*24 + 4
)

var errRecord = errors.New("log record is damaged")

func (s *state) encode(b *[recordSize]byte) {
	le := binary.LittleEndian
	le.PutUint32(b[0:], recordMagic)
	le.PutUint32(b[4:], recordVersion)
	le.PutUint64(b[8:], s.dev)
	le.PutUint64(b[16:], s.ino)
	le.PutUint64(b[24:], uint64(s.size))
	le.PutUint64(b[32:], uint64(s.expect))
	le.PutUint64(b[40:], uint64(s.at))
	le.PutUint64(b[48:], uint64(s.stream))
	at := 56
	for _, p := range s.pos {
		le.PutUint64(b[at:], uint64(p.active))
		le.PutUint64(b[at+8:], uint64(p.from))
		le.PutUint64(b[at+16:], uint64(p.to))
		at += 24
	}
	le.PutUint32(b[at:], crc32.ChecksumIEEE(b[:at]))
}

// decode reads a record. It refuses what encode cannot have written.
func (s *state) decode(b []byte) error {
	if len(b) != recordSize {
		return fmt.Errorf("%w: %d bytes, want %d", errRecord, len(b), recordSize)
	}
	le := binary.LittleEndian
	if le.Uint32(b) != recordMagic {
		return fmt.Errorf("%w: magic %#x", errRecord, le.Uint32(b))
	}
	if v := le.Uint32(b[4:]); v != recordVersion {
		return fmt.Errorf("log record of version %d, this program knows %d", v, recordVersion)
	}
	if le.Uint32(b[recordSize-4:]) != crc32.ChecksumIEEE(b[:recordSize-4]) {
		return fmt.Errorf("%w: checksum", errRecord)
	}
	n := state{
		dev: le.Uint64(b[8:]), ino: le.Uint64(b[16:]),
		size: int64(le.Uint64(b[24:])), expect: int64(le.Uint64(b[32:])),
		at: int64(le.Uint64(b[40:])), stream: Stream(b[48]),
	}
	if le.Uint64(b[48:]) >= uint64(streams) || n.size < 0 || n.expect < 0 {
		return errRecord
	}
	at := 56
	for i := range n.pos {
		active := le.Uint64(b[at:])
		p := position{active: uint8(active), from: int64(le.Uint64(b[at+8:])), to: int64(le.Uint64(b[at+16:]))}
		if active > 1 || p.from < 0 || p.to < p.from {
			return errRecord
		}
		n.pos[i] = p
		at += 24
	}
	*s = n
	return nil
}
