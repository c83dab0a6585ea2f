package cgroups

import (
	"math"
	"reflect"
	"strings"
	"testing"

	ocicgroups "github.com/opencontainers/cgroups"

	"github.com/nodeagent/nodeagent/metrics/sample"
)

func TestParseValue(t *testing.T) {
	for _, c := range []struct {
		in    string
		value uint64
		limit uint64
		ok    bool
	}{
		{"0\n", 0, 0, true},
		{"42", 42, 42, true},
		{"max\n", sample.Unlimited, sample.Unlimited, true},
		{"-1\n", sample.Unlimited, sample.Unlimited, true},
		{"9223372036854771712\n", 9223372036854771712, sample.Unlimited, true}, // 4 KiB pages
		{"9223372036854710272\n", 9223372036854710272, sample.Unlimited, true}, // 64 KiB pages
		{"18446744073709551615\n", math.MaxUint64, sample.Unlimited, true},
		{"18446744073709551616\n", 0, 0, false},
		{"99999999999999999999999\n", 0, 0, false},
		{"", 0, 0, false},
		{"12a\n", 0, 0, false},
		{"-2\n", 0, 0, false},
		{"1 2\n", 0, 0, false},
	} {
		v, err := parseValue([]byte(c.in))
		if (err == nil) != c.ok || (c.ok && v != c.value) {
			t.Errorf("parseValue(%q) = %d, %v", c.in, v, err)
		}
		l, err := parseLimit([]byte(c.in))
		if (err == nil) != c.ok || (c.ok && l != c.limit) {
			t.Errorf("parseLimit(%q) = %d, %v", c.in, l, err)
		}
	}
}

func TestParseKeyed(t *testing.T) {
	in := "anon 1\n\nfile 2\nbroken\nanon_thp 3\nfile 9\nlast 4"
	var anon, file, last, none uint64
	if err := parseKeyed([]byte(in), field{"anon", &anon}, field{"last", &last}, field{"file", &file}, field{"none", &none}); err != nil {
		t.Fatal(err)
	}
	if anon != 1 || last != 4 || none != 0 {
		t.Errorf("anon %d file %d last %d none %d", anon, file, last, none)
	}
	if err := parseKeyed([]byte("anon x\n"), field{"anon", &anon}); err == nil || !strings.Contains(err.Error(), "anon") {
		t.Errorf("error %v does not say which key", err)
	}
}

func TestParseCPUMax(t *testing.T) {
	for _, c := range []struct {
		in     string
		quota  int64
		period uint64
		ok     bool
	}{
		{"max 100000\n", -1, 100000, true},
		{"50000 100000\n", 50000, 100000, true},
		{"50000\n", 0, 0, false},
		{"\n", 0, 0, false},
	} {
		q, p, err := parseCPUMax([]byte(c.in))
		if (err == nil) != c.ok || q != c.quota || p != c.period {
			t.Errorf("parseCPUMax(%q) = %d, %d, %v", c.in, q, p, err)
		}
	}
}

func TestParsePSI(t *testing.T) {
	for _, c := range []struct {
		in   string
		want sample.Pressure
	}{
		{
			"some avg10=12.34 avg60=0.50 avg300=100.00 total=123456\nfull avg10=0.00 avg60=0.01 avg300=0.00 total=7\n",
			sample.Pressure{
				Some: sample.PressureLine{Avg10: 12.34, Avg60: 0.5, Avg300: 100, Total: 123456},
				Full: sample.PressureLine{Avg60: 0.01, Total: 7},
			},
		},
		// Before 5.13 cpu.pressure has no full line.
		{"some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n", sample.Pressure{Some: sample.PressureLine{Total: 5}}},
		{"later avg10=x\n", sample.Pressure{}},
	} {
		var got sample.Pressure
		if err := parsePSI([]byte(c.in), &got); err != nil || got != c.want {
			t.Errorf("parsePSI(%q) = %+v, %v", c.in, got, err)
		}
	}
	for _, in := range []string{"some avg10=a total=1", "full total=", "some avg60=1.x"} {
		if err := parsePSI([]byte(in), new(sample.Pressure)); err == nil {
			t.Errorf("parsePSI(%q): no error", in)
		}
	}
}

func TestParseIO(t *testing.T) {
	got, err := parseIOStat([]byte("8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=5 dios=6 cost.usage=99\n(unknown) rbytes=1\n8:0 rbytes=90430464\n253:0 \n"), nil)
	want := []sample.DeviceIO{
		{Major: 8, Minor: 16, ReadBytes: 1459200, WriteBytes: 314773504, Reads: 192, Writes: 353, DiscardBytes: 5, Discards: 6},
		{Major: 8, ReadBytes: 90430464},
		{Major: 253},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("io.stat: %+v, %v", got, err)
	}
	bytes, err := parseBlkio([]byte("8:0 Read 100\n8:0 Write 200\n8:0 Sync 250\n8:0 Async 50\n8:0 Discard 7\n8:0 Total 307\n8:16 Read 1\nTotal 308\n"), nil, blkioBytes)
	if err != nil {
		t.Fatal(err)
	}
	all, err := parseBlkio([]byte("8:0 Read 10\n8:0 Write 20\n8:0 Discard 3\n8:16 Read 4\nTotal 37\n"), bytes, blkioCount)
	want = []sample.DeviceIO{
		{Major: 8, ReadBytes: 100, WriteBytes: 200, DiscardBytes: 7, Reads: 10, Writes: 20, Discards: 3},
		{Major: 8, Minor: 16, ReadBytes: 1, Reads: 4},
	}
	if err != nil || !reflect.DeepEqual(all, want) {
		t.Errorf("blkio: %+v, %v", all, err)
	}
}

func TestSharesOf(t *testing.T) {
	for _, c := range [][2]uint64{{0, 0}, {1, 2}, {100, 1024}, {10000, 262144}} {
		if got := sharesOf(c[0]); got != c[1] {
			t.Errorf("sharesOf(%d) = %d, want %d", c[0], got, c[1])
		}
	}
	for shares := uint64(32); shares < 262144; shares += 97 {
		weight := ocicgroups.ConvertCPUSharesToCgroupV2Value(shares)
		got := sharesOf(weight)
		if lo := sharesOf(weight - 1); got < shares-1 || lo > shares {
			t.Errorf("shares %d are weight %d, which is %d", shares, weight, got)
		}
	}
}

func TestParseMounts(t *testing.T) {
	v1 := `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
99 31 0:32 / /var/lib/jail/cgroup/memory rw,relatime - cgroup cgroup rw,memory
`
	unified := "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
	v2 := `30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
`
	for _, c := range []struct {
		name, table string
		want        Host
		bad         bool
	}{
		{name: "v1", table: v1, want: Host{Mode: V1, Controllers: []string{"cpu", "cpuacct", "memory"}, Mounts: map[string]string{
			"cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct", "memory": "/sys/fs/cgroup/memory", "name=systemd": "/sys/fs/cgroup/systemd"}}},
		{name: "hybrid", table: v1 + unified, want: Host{Mode: Hybrid, Controllers: []string{"cpu", "cpuacct", "memory"}, Mounts: map[string]string{
			"": "/sys/fs/cgroup/unified", "cpu": "/sys/fs/cgroup/cpu,cpuacct", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct", "memory": "/sys/fs/cgroup/memory", "name=systemd": "/sys/fs/cgroup/systemd"}}},
		{name: "v2", table: v2, want: Host{Mode: V2, Mounts: map[string]string{"": "/sys/fs/cgroup"}}},
		{name: "v2 with a stray v1", table: v2 + "50 23 0:50 / /mnt/net\\040cls rw - cgroup cgroup rw,net_cls\n", want: Host{Mode: V2, Mounts: map[string]string{"": "/sys/fs/cgroup"}}},
		{name: "none", table: "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n", bad: true},
		{name: "torn", table: "1 0 8:1 / /\ncgroup", bad: true},
	} {
		got, err := parseMounts(strings.NewReader(c.table))
		if (err != nil) != c.bad {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil && !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	if got := unescapeMount(`/a\040b\134c\1`); got != `/a b\c\1` {
		t.Errorf("unescapeMount: %q", got)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"max\n", "-1", "123 456\n", "some avg10=1.00 avg60=2.00 avg300=3.00 total=4\nfull avg10=0.00",
		"8:0 rbytes=1 wbytes=2", "8:0 Read 1\nTotal 2\n", "anon 5\nfile 6\n", "4294967296:0 Read 1\n",
		"31 23 0:28 / /sys/fs/cgroup rw - cgroup cgroup rw,cpu",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := string(b)
		if n, err := parseUint(b); err == nil && len(b) < 20 && strings.TrimLeft(in, "0") != "" {
			if want := strings.TrimLeft(in, "0"); want != uintString(n) {
				t.Errorf("parseUint(%q) = %d", in, n)
			}
		}
		parseLimit(b)
		parseCPUMax(b)
		var x, y uint64
		parseKeyed(b, field{"anon", &x}, field{"file", &y})
		var p sample.Pressure
		if parsePSI(b, &p) == nil && (math.IsNaN(p.Some.Avg10) || p.Some.Avg10 < 0) {
			t.Errorf("pressure %+v of %q", p, in)
		}
		list, _ := parseIOStat(b, nil)
		parseBlkio(b, list, blkioBytes)
		parseMounts(strings.NewReader(in))
		if string(b) != in {
			t.Error("a parser changed its input")
		}
	})
}

func uintString(n uint64) string {
	var b [20]byte
	i := len(b)
	for {
		i--
		b[i] = byte('0' + n%10)
		if n /= 10; n == 0 {
			return string(b[i:])
		}
	}
}
