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
		p.width = terminalWidth(f)
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
	for _, l := range p.layers {
		fmt.Fprintf(&b, "\r\x1b[K%s\n", p.line(l))
	}
	p.drawn = len(p.layers)
	io.WriteString(p.w, b.String())
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
