package criolog

import (
	"bytes"
	"strconv"
	"time"
)

// Stream is one of the two outputs of a container.
type Stream uint8

const (
	Stdout Stream = iota
	Stderr
	streams
)

// String is the name that the CRI log format has for s.
func (s Stream) String() string {
	if s == Stderr {
		return "stderr"
	}
	return "stdout"
}

// batch is what one call of appendLines writes with: all that decides its
// bytes. The same batch over the same input gives the same output, which is
// what lets a new shim finish a write that the old one was killed in.
type batch struct {
	at      int64 // ns since the epoch, of the first line; each further line is 1 ns later
	stream  Stream
	max     int  // longest line in bytes, newline apart
	stripCR bool // a CR in front of the newline is the terminal's, not the program's
}

// appendLines appends the lines of src to dst in the CRI format,
//
//	2006-01-02T15:04:05.000000000Z stdout F text
//
// and returns dst, how many bytes of src it used and how many lines it made. A line longer than max is
// cut in pieces tagged P. Bytes after the last newline stay unused, unless
// final is set: then they become a line tagged P. It stops after the line with
// which dst has limit bytes (0: no limit).
func (b batch) appendLines(dst, src []byte, final bool, limit int) (_ []byte, used, lines int) {
	var (
		clock = stamp{ns: b.at}
		full  = " " + b.stream.String() + " F "
		part  = " " + b.stream.String() + " P "
	)
	for used < len(src) {
		rest := src[used:]
		window := rest[:min(len(rest), b.max+1)]
		tag, line, next := full, []byte(nil), 0
		switch i := bytes.IndexByte(window, '\n'); {
		case i >= 0:
			line, next = rest[:i], i+1
			if b.stripCR && i > 0 && line[i-1] == '\r' {
				line = line[:i-1]
			}
		case len(rest) > b.max:
			tag, line, next = part, rest[:b.max], b.max
		case final:
			tag, line, next = part, rest, len(rest)
		default:
			return dst, used, lines
		}
		dst = clock.append(dst)
		dst = append(dst, tag...)
		dst = append(dst, line...)
		dst = append(dst, '\n')
		used += next
		clock.ns++
		lines++
		if limit > 0 && len(dst) >= limit {
			break
		}
	}
	return dst, used, lines
}

// stamp prints ns as RFC 3339 with nine digits of fraction in UTC; it keeps
// the seconds as text because many lines share them.
type stamp struct {
	ns     int64
	second int64
	text   [20]byte // "2006-01-02T15:04:05."
}

func (s *stamp) append(dst []byte) []byte {
	sec, frac := s.ns/1e9, s.ns%1e9
	if sec != s.second || s.text[0] == 0 {
		s.second = sec
		time.Unix(sec, 0).UTC().AppendFormat(s.text[:0], "2006-01-02T15:04:05.")
	}
	dst = append(dst, s.text[:]...)
	var digits [10]byte
	// The leading 1 keeps the zeros of the fraction.
	strconv.AppendInt(digits[:0], 1e9+frac, 10)
	dst = append(dst, digits[1:]...)
	return append(dst, 'Z')
}
