package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// screen writes the show. On a terminal it paints and redraws; elsewhere it
// writes the same words as plain lines.
type screen struct {
	out      *os.File
	terminal bool
	colour   bool
	began    time.Time // of the step in hand
}

func newScreen(f *os.File) *screen {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return &screen{out: f, terminal: err == nil, colour: err == nil && os.Getenv("NO_COLOR") == ""}
}

func (s *screen) paint(code, text string) string {
	if !s.colour || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s *screen) bold(t string) string  { return s.paint("1", t) }
func (s *screen) dim(t string) string   { return s.paint("2", t) }
func (s *screen) green(t string) string { return s.paint("32", t) }
func (s *screen) red(t string) string   { return s.paint("31;1", t) }
func (s *screen) cyan(t string) string  { return s.paint("36", t) }

func (s *screen) title(name, what string) {
	fmt.Fprintf(s.out, "\n%s  %s\n", s.bold(name), s.dim(what))
}

// step begins a chapter.
func (s *screen) step(what, detail string) {
	s.began = time.Now()
	fmt.Fprintf(s.out, "\n%s  %s\n", s.bold(what), s.dim(detail))
}

// done says what has been reached, and how long it took.
func (s *screen) done(format string, args ...any) {
	s.doneIn(time.Since(s.began), format, args...)
}

func (s *screen) doneIn(d time.Duration, format string, args ...any) {
	fmt.Fprintf(s.out, "  %s %s  %s\n", s.green("✓"), fmt.Sprintf(format, args...), s.dim(took(d)))
}

func (s *screen) text(line string) {
	fmt.Fprintln(s.out, strings.TrimRight("  "+line, " "))
}

// code is something to type.
func (s *screen) code(line string) { fmt.Fprintf(s.out, "    %s\n", s.cyan(line)) }

// output is what something else has said.
func (s *screen) output(name, line string) {
	fmt.Fprintf(s.out, "  %s %s\n", s.dim(fmt.Sprintf("%-8s│", name)), line)
}

func (s *screen) fail(err error) {
	fmt.Fprintf(s.out, "\n  %s %v\n", s.red("✗"), err)
}

// table draws rows; called again on a terminal it draws over the last ones.
func (s *screen) table(rows [][]string, again bool) {
	if again && s.terminal {
		fmt.Fprintf(s.out, "\x1b[%dA", len(rows))
	}
	widths := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, c := range r {
			widths[i] = max(widths[i], len([]rune(c)), 10)
		}
	}
	for i, r := range rows {
		var b strings.Builder
		for j, c := range r {
			fmt.Fprintf(&b, "%-*s  ", widths[j], c)
		}
		line := strings.TrimRight(b.String(), " ")
		if i == 0 {
			line = s.dim(line)
		}
		clear := ""
		if s.terminal {
			clear = "\x1b[K"
		}
		fmt.Fprintf(s.out, "%s  %s\n", clear, line)
	}
}

// took rounds for a reader.
func took(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func size(n uint64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.0f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}
