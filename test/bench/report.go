package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sort"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// figures are the results of one runtime by name.
type figures map[string]figure

type figure struct {
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	P95   float64 `json:"p95,omitempty"`
	N     int     `json:"n,omitempty"`
}

func (f figures) set(name, unit string, v float64) { f[name] = figure{Value: v, Unit: unit} }

func (f figures) timings(t *timings) {
	for name, ms := range t.by {
		f[name] = figure{Value: quantile(ms, 0.5), P95: quantile(ms, 0.95), Unit: "ms", N: len(ms)}
	}
}

func median(v []float64) float64 { return quantile(v, 0.5) }

func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}

// goal is what a figure has to reach: a ratio to the reference or a value.
type goal struct {
	figure string
	ratio  float64 // ours / reference: at most, or at least if more
	value  float64 // ours: at most
	more   bool
}

const floorCall = "Version (the cost of any call)"

// goals of the issue, section 6.
var goals = []goal{
	{figure: "pod start", ratio: 0.25},
	{figure: "pod stop+remove", ratio: 0.25},
	{figure: "pods/s, 4 at a time", ratio: 4, more: true},
	{figure: "CPU per pod start", ratio: 0.25},
	{figure: "ExecSync", ratio: 0.25},
	{figure: "CPU per ExecSync", ratio: 0.25},
	{figure: "memory (PSS), 0 pods", value: 30},
	{figure: "memory (PSS), 50 pods", value: 30 + 50*0.4},
	{figure: "memory (PSS), 200 pods", value: 30 + 200*0.4},
	{figure: "memory per additional pod", value: 0.4},
	{figure: "idle CPU, 50 pods", value: 1},
	{figure: "ListContainerStats, 50 pods", ratio: 0.2},
	{figure: "ListPodSandboxStats, 50 pods", ratio: 0.2},
	{figure: "ListPodSandbox, 50 pods", ratio: 0.2},
	{figure: "ListContainers, 50 pods", ratio: 0.2},
	{figure: "pull+unpack 100 MB", ratio: 1},
	{figure: "log throughput", ratio: 2, more: true},
}

// report is what is written as JSON.
type report struct {
	Time     time.Time          `json:"time"`
	Machine  machine            `json:"machine"`
	Runtimes map[string]figures `json:"runtimes"`
	Goals    []outcome          `json:"goals,omitempty"`
	order    []string
}

type machine struct {
	Kernel string  `json:"kernel"`
	CPUs   int     `json:"cpus"`
	Load   float64 `json:"load"` // at the end, of one minute: ours included
}

type outcome struct {
	Figure  string   `json:"figure"`
	Ours    float64  `json:"ours"`
	Ratio   *float64 `json:"ratio,omitempty"` // ours / reference
	Want    string   `json:"want"`
	Reached bool     `json:"reached"`
	// AtFloor: not reached, but a call that does nothing takes as long.
	AtFloor bool `json:"atFloor,omitempty"`
}

func (b *bench) report() report {
	rep := report{Time: time.Now().UTC(), Runtimes: map[string]figures{}}
	var u unix.Utsname
	unix.Uname(&u)
	rep.Machine.Kernel = unix.ByteSliceToString(u.Release[:])
	cpus, _ := os.ReadFile("/proc/stat")
	rep.Machine.CPUs = strings.Count(string(cpus), "\ncpu")
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Sscan(string(load), &rep.Machine.Load)
	for _, r := range b.runtimes {
		rep.Runtimes[r.name] = r.figures
		rep.order = append(rep.order, r.name)
	}
	us, ref := rep.Runtimes[ours], rep.Runtimes[reference]
	for _, g := range goals {
		f, ok := us[g.figure]
		if !ok {
			continue
		}
		o := outcome{Figure: g.figure, Ours: f.Value}
		if g.ratio == 0 {
			o.Want, o.Reached = fmt.Sprintf("≤ %g %s", g.value, f.Unit), f.Value <= g.value
		} else {
			r, ok := ref[g.figure]
			if !ok || r.Value == 0 {
				continue
			}
			q := f.Value / r.Value
			o.Ratio = &q
			if g.more {
				o.Want, o.Reached = fmt.Sprintf("≥ %g×", g.ratio), q >= g.ratio
			} else {
				o.Want, o.Reached = fmt.Sprintf("≤ %g×", g.ratio), q <= g.ratio
			}
		}
		floor, ok := us[floorCall]
		o.AtFloor = !o.Reached && strings.HasPrefix(g.figure, "List") && ok && f.Value <= 1.5*floor.Value
		rep.Goals = append(rep.Goals, o)
	}
	return rep
}

func (r report) print(w io.Writer) {
	t := tabwriter.NewWriter(w, 2, 8, 2, ' ', tabwriter.AlignRight)
	head := "\t"
	for _, n := range r.order {
		head += n + "\tp95\t"
	}
	ref, compare := r.Runtimes[reference]
	us, have := r.Runtimes[ours]
	compare = compare && have
	if compare {
		head += "ratio\t"
	}
	fmt.Fprintln(t, head+" ")
	for _, name := range r.names() {
		row, unit := name, ""
		for _, n := range r.order {
			f, ok := r.Runtimes[n][name]
			if !ok {
				row += "\t-\t"
				continue
			}
			unit = f.Unit
			row += "\t" + num(f.Value) + "\t"
			if f.P95 != 0 {
				row += num(f.P95)
			}
		}
		if unit != "" {
			row = strings.Replace(row, name, name+" ["+unit+"]", 1)
		}
		if compare {
			a, okA := us[name]
			b, okB := ref[name]
			row += "\t"
			if okA && okB && b.Value != 0 {
				row += fmt.Sprintf("%.2f", a.Value/b.Value)
			}
		}
		fmt.Fprintln(t, row+"\t ")
	}
	t.Flush()
	if len(r.Goals) == 0 {
		return
	}
	fmt.Fprintln(w)
	t = tabwriter.NewWriter(w, 2, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "goal\tours\tours/"+reference+"\twant\treached\t ")
	for _, g := range r.Goals {
		ratio, reached := "", "yes"
		if g.Ratio != nil {
			ratio = fmt.Sprintf("%.2f", *g.Ratio)
		}
		if !g.Reached {
			reached = "NO"
		}
		if g.AtFloor {
			reached = "no: as fast as a call that does nothing"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t \n", g.Figure, num(g.Ours), ratio, g.Want, reached)
	}
	t.Flush()
}

// names of all figures: in the order of interest, then by name.
func (r report) names() []string {
	rank := map[string]int{}
	for i, g := range goals {
		rank[g.figure] = i + 1
	}
	seen := map[string]bool{}
	var out []string
	for _, f := range r.Runtimes {
		for n := range f {
			if !seen[n] {
				seen[n] = true
				out = append(out, n)
			}
		}
	}
	sort.Slice(out, func(i, j int) bool {
		a, b := rank[out[i]], rank[out[j]]
		if (a == 0) != (b == 0) {
			return a != 0
		}
		if a != b {
			return a < b
		}
		return out[i] < out[j]
	})
	return out
}

func num(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}
