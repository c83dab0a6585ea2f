package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/opencontainers/go-digest"
)

// progress shows a pull or an import: one bar a layer, redrawn in place, on a
// terminal; elsewhere one line whenever a layer reaches its next phase.
type progress struct {
	w     io.Writer
	style style
	width int // of the terminal in columns; 0: no terminal
	rows  int // of the terminal

	layers []images.Progress
	at     map[digest.Digest]int // index into layers
	drawn  int                   // lines on the terminal now
	last   time.Time             // of the last drawing
}

// redrawInterval is short enough to look smooth.
const redrawInterval = 60 * time.Millisecond

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, style: styleFor(w), at: map[digest.Digest]int{}}
	if f, ok := w.(*os.File); ok {
		p.width, p.rows = terminalSize(f)
	}
	return p
}

func (p *progress) update(now images.Progress) {
	if now.Kind != "layer" {
		return // manifests and configurations are small and quick
	}
	i, known := p.at[now.Digest]
	changed := !known || p.layers[i].Phase != now.Phase
	if !known {
		i = len(p.layers)
		p.at[now.Digest] = i
		p.layers = append(p.layers, now)
	}
	p.layers[i] = now
	switch {
	case p.width > 0:
		if changed || time.Since(p.last) >= redrawInterval {
			p.draw()
		}
	case changed:
		fmt.Fprintf(p.w, "layer %s  %-11s  %s\n", shortID(now.Digest.String()), now.Phase, humanBytes(now.Total))
	}
}

// finish leaves the last state on the screen.
func (p *progress) finish() {
	if p.width > 0 && len(p.layers) > 0 {
		p.draw()
	}
}

func (p *progress) draw() {
	p.last = time.Now()
	var b strings.Builder
	if p.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", p.drawn)
	}
	lines := p.lines()
	for _, l := range lines {
		fmt.Fprintf(&b, "\r\x1b[K%s\n", l)
	}
	p.drawn = len(lines)
	io.WriteString(p.w, b.String())
}

// lines are as many as the terminal can show and redraw: if there are more
// layers, those that are not finished, and the number of the others.
func (p *progress) lines() []string {
	room := max(2, p.rows-1)
	var lines []string
	if len(p.layers) <= room {
		for _, l := range p.layers {
			lines = append(lines, p.line(l))
		}
		return lines
	}
	for _, l := range p.layers {
		if l.Phase != images.Unpacked && len(lines) < room-1 {
			lines = append(lines, p.line(l))
		}
	}
	others := len(p.layers) - len(lines)
	for len(lines) < room-1 && len(lines) < p.drawn-1 {
		lines = append(lines, "") // never fewer lines than are on the screen
	}
	return append(lines, fmt.Sprintf("  %d of %d layers are not shown", others, len(p.layers)))
}

// line is one layer: id, phase, bar, bytes.
func (p *progress) line(l images.Progress) string {
	share := 0.0
	if l.Total > 0 {
		share = min(1, float64(l.Offset)/float64(l.Total))
	}
	if l.Phase == images.Unpacked {
		share = 1
	}
	text := fmt.Sprintf("  %s  %-11s  ", shortID(l.Digest.String()), l.Phase)
	bytes := fmt.Sprintf("  %9s", humanBytes(l.Total))
	room := max(0, min(40, p.width-len(text)-len(bytes)-1))
	full := int(share * float64(room))
	bar := p.style.green(strings.Repeat("━", full)) + p.style.dim(strings.Repeat("─", room-full))
	return text + bar + bytes
}
