package main

import (
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// style paints text for a terminal; its zero value leaves text as it is.
type style struct{ colour bool }

// styleFor paints only where a person looks: on a terminal, unless NO_COLOR is
// set (no-color.org).
func styleFor(w io.Writer) style {
	return style{colour: isTerminal(w) && os.Getenv("NO_COLOR") == ""}
}

func (s style) paint(code, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s style) bold(t string) string   { return s.paint("1", t) }
func (s style) dim(t string) string    { return s.paint("2", t) }
func (s style) red(t string) string    { return s.paint("31;1", t) }
func (s style) green(t string) string  { return s.paint("32", t) }
func (s style) yellow(t string) string { return s.paint("33", t) }

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	columns, _ := terminalSize(f)
	return columns > 0
}

// terminalSize is 0, 0 if f is no terminal.
func terminalSize(f *os.File) (columns, rows int) {
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0
	}
	if ws.Col == 0 || ws.Row == 0 {
		return 80, 24 // a terminal that does not know, such as a serial line
	}
	return int(ws.Col), int(ws.Row)
}
