package cgroups

import (
	"bytes"
	"fmt"
	"math"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

// The parsers take what the kernel writes and never allocate on the good
// path. Numbers that do not fit end the parse with an error; keys that are
// not known are skipped, because newer kernels add some.

// noLimit is where v1 begins to mean "none": PAGE_COUNTER_MAX in bytes, 2^63
// less a page, whatever the page size.
const noLimit = 1 << 62

// parseUint reads a decimal number that fills b.
func parseUint(b []byte) (uint64, error) {
	if len(b) == 0 {
		return 0, fmt.Errorf("parse number: empty")
	}
	var n uint64
	for _, c := range b {
		d := uint64(c - '0')
		if d > 9 || n > (1<<64-1-d)/10 {
			return 0, fmt.Errorf("parse number %q", b)
		}
		n = n*10 + d
	}
	return n, nil
}

// parseValue reads a file that holds one number, "max" or (v1) "-1".
func parseValue(b []byte) (uint64, error) {
	b = bytes.TrimSpace(b)
	if string(b) == "max" || string(b) == "-1" {
		return sample.Unlimited, nil
	}
	return parseUint(b)
}

// parseLimit is parseValue for bytes, where v1 writes a huge number for none.
func parseLimit(b []byte) (uint64, error) {
	n, err := parseValue(b)
	if n >= noLimit {
		n = sample.Unlimited
	}
	return n, err
}

// nextLine splits off the first line that is not empty.
func nextLine(b []byte) (line, rest []byte) {
	for len(b) > 0 {
		i := bytes.IndexByte(b, '\n')
		if i < 0 {
			return b, nil
		}
		line, b = b[:i], b[i+1:]
		if len(line) > 0 {
			return line, b
		}
	}
	return nil, nil
}

// cutByte is bytes.Cut at one byte.
func cutByte(b []byte, sep byte) (before, after []byte, ok bool) {
	if i := bytes.IndexByte(b, sep); i >= 0 {
		return b[:i], b[i+1:], true
	}
	return b, nil, false
}

// field is a key of a flat keyed file and where its number goes.
type field struct {
	key string
	to  *uint64
}

// parseKeyed reads "key number" lines into the fields.
func parseKeyed(b []byte, fields ...field) error {
	left := len(fields)
	for line, rest := nextLine(b); line != nil && left > 0; line, rest = nextLine(rest) {
		key, value, ok := cutByte(line, ' ')
		if !ok {
			continue
		}
		for i := range fields {
			if string(key) != fields[i].key {
				continue
			}
			n, err := parseUint(value)
			if err != nil {
				return fmt.Errorf("%s: %w", fields[i].key, err)
			}
			*fields[i].to = n
			left--
			break
		}
	}
	return nil
}

// parseCPUMax reads "quota period" of cpu.max, in microseconds; quota -1 is
// "max".
func parseCPUMax(b []byte) (quota int64, period uint64, err error) {
	q, p, _ := cutByte(bytes.TrimSpace(b), ' ')
	n, err := parseValue(q)
	if err != nil {
		return 0, 0, err
	}
	if period, err = parseUint(p); err != nil {
		return 0, 0, err
	}
	return limitToQuota(n), period, nil
}

func limitToQuota(n uint64) int64 {
	if n >= noLimit {
		return -1
	}
	return int64(n)
}

// parsePSI reads a pressure file. The "full" line of cpu came with 5.13.
func parsePSI(b []byte, p *sample.Pressure) error {
	for line, rest := nextLine(b); line != nil; line, rest = nextLine(rest) {
		kind, values, _ := cutByte(line, ' ')
		var to *sample.PressureLine
		switch string(kind) {
		case "some":
			to = &p.Some
		case "full":
			to = &p.Full
		default:
			continue
		}
		if err := parsePSILine(values, to); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
	}
	return nil
}

func parsePSILine(b []byte, to *sample.PressureLine) error {
	for len(b) > 0 {
		var pair []byte
		pair, b, _ = cutByte(b, ' ')
		key, value, _ := cutByte(pair, '=')
		var err error
		switch string(key) {
		case "avg10":
			to.Avg10, err = parsePercent(value)
		case "avg60":
			to.Avg60, err = parsePercent(value)
		case "avg300":
			to.Avg300, err = parsePercent(value)
		case "total":
			to.Total, err = parseUint(value)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// parsePercent reads "12.34"; the kernel writes two decimals.
func parsePercent(b []byte) (float64, error) {
	whole, frac, ok := cutByte(b, '.')
	n, err := parseUint(whole)
	if err != nil {
		return 0, err
	}
	f := float64(n)
	if ok {
		n, err := parseUint(frac)
		if err != nil || len(frac) > 9 {
			return 0, fmt.Errorf("parse percentage %q", b)
		}
		scale := 1.0
		for range frac {
			scale *= 10
		}
		f += float64(n) / scale
	}
	return f, nil
}

// parseDevice reads "major:minor".
func parseDevice(b []byte) (major, minor uint32, ok bool) {
	a, c, ok := cutByte(b, ':')
	if !ok {
		return 0, 0, false
	}
	x, err1 := parseUint(a)
	y, err2 := parseUint(c)
	if err1 != nil || err2 != nil || x >= 1<<32 || y >= 1<<32 {
		return 0, 0, false
	}
	return uint32(x), uint32(y), true
}

// device finds or adds the entry of a device.
func device(list []sample.DeviceIO, major, minor uint32) ([]sample.DeviceIO, *sample.DeviceIO) {
	for i := range list {
		if list[i].Major == major && list[i].Minor == minor {
			return list, &list[i]
		}
	}
	list = append(list, sample.DeviceIO{Major: major, Minor: minor})
	return list, &list[len(list)-1]
}

// parseIOStat reads io.stat (v2): "8:0 rbytes=1 wbytes=2 rios=3 ...".
func parseIOStat(b []byte, list []sample.DeviceIO) ([]sample.DeviceIO, error) {
	for line, rest := nextLine(b); line != nil; line, rest = nextLine(rest) {
		dev, values, _ := cutByte(line, ' ')
		major, minor, ok := parseDevice(dev)
		if !ok {
			continue // "(unknown)", a device that is being removed
		}
		var to *sample.DeviceIO
		list, to = device(list, major, minor)
		if err := parseIOLine(values, to); err != nil {
			return list, fmt.Errorf("device %d:%d: %w", major, minor, err)
		}
	}
	return list, nil
}

func parseIOLine(b []byte, to *sample.DeviceIO) error {
	for len(b) > 0 {
		var pair []byte
		pair, b, _ = cutByte(b, ' ')
		key, value, _ := cutByte(pair, '=')
		var n *uint64
		switch string(key) {
		case "rbytes":
			n = &to.ReadBytes
		case "wbytes":
			n = &to.WriteBytes
		case "rios":
			n = &to.Reads
		case "wios":
			n = &to.Writes
		case "dbytes":
			n = &to.DiscardBytes
		case "dios":
			n = &to.Discards
		default:
			continue // cost.*, use_delay
		}
		v, err := parseUint(value)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		*n = v
	}
	return nil
}

// parseBlkio reads a blkio.throttle file (v1): "8:0 Read 123" lines and a
// "Total" without a device. pick says where an operation's number goes.
func parseBlkio(b []byte, list []sample.DeviceIO, pick func(*sample.DeviceIO, blkioOp) *uint64) ([]sample.DeviceIO, error) {
	for line, rest := nextLine(b); line != nil; line, rest = nextLine(rest) {
		dev, tail, _ := cutByte(line, ' ')
		major, minor, ok := parseDevice(dev)
		if !ok {
			continue
		}
		name, value, ok := cutByte(tail, ' ')
		op := blkioOpOf(name)
		if !ok || op == opOther {
			continue
		}
		v, err := parseUint(value)
		if err != nil {
			return list, fmt.Errorf("device %d:%d: %w", major, minor, err)
		}
		var to *sample.DeviceIO
		list, to = device(list, major, minor)
		*pick(to, op) = v
	}
	return list, nil
}

type blkioOp int

const (
	opOther blkioOp = iota
	opRead
	opWrite
	opDiscard
)

func blkioOpOf(name []byte) blkioOp {
	switch string(name) {
	case "Read":
		return opRead
	case "Write":
		return opWrite
	case "Discard":
		return opDiscard
	}
	return opOther // Sync, Async, Total: sums of the others
}

func blkioBytes(d *sample.DeviceIO, op blkioOp) *uint64 {
	return [...]*uint64{opRead: &d.ReadBytes, opWrite: &d.WriteBytes, opDiscard: &d.DiscardBytes}[op]
}

func blkioCount(d *sample.DeviceIO, op blkioOp) *uint64 {
	return [...]*uint64{opRead: &d.Reads, opWrite: &d.Writes, opDiscard: &d.Discards}[op]
}

// sharesOf turns a v2 weight into v1 shares: the inverse of the quadratic that
// libcontainer, crun and the kubelet use (ConvertCPUSharesToCgroupV2Value),
// which meets the least, default and greatest values of both. Weights are whole
// numbers, so that shares come back within a few percent.
func sharesOf(weight uint64) uint64 {
	if weight == 0 {
		return 0
	}
	c := 612 * (math.Log10(float64(weight)) + 7.0/34.0)
	l := (math.Sqrt(125*125+4*c) - 125) / 2
	return uint64(math.Round(math.Exp2(l)))
}
