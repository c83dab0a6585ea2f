// Command applets is what the images of the CRI validation suite need and
// Debian's busybox has not: it does what its name says (ipcs, pgrep), serves a
// page as nginx, and as nnp, a setuid file, tells its effective user.
package main

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const title = "nginx: master process nginx"

func main() {
	var err error
	switch name := filepath.Base(os.Args[0]); name {
	case "nnp":
		fmt.Printf("Effective uid: %d\n", os.Geteuid())
	case "nginx":
		// The suite looks for the title that the real one gives itself.
		err = syscall.Exec("/proc/self/exe", append([]string{title}, os.Args[1:]...), os.Environ())
	case title:
		err = serve(os.Args[len(os.Args)-1])
	case "ipcs":
		err = ipcs()
	case "pgrep":
		err = pgrep(os.Args[len(os.Args)-1])
	default:
		err = fmt.Errorf("no applet %q", name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// serve answers every request on a port.
func serve(port string) error {
	fmt.Println("httpd started on port", port)
	if err := os.WriteFile("/var/run/nginx.pid", fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
		return err
	}
	return http.ListenAndServe(":"+port, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Println(r.RemoteAddr, r.URL.Path)
		fmt.Fprintln(w, "<html>It works!</html>")
	}))
}

// ipcs lists shared memory segments with their ids.
func ipcs() error {
	f, err := os.Open("/proc/sysvipc/shm")
	if err != nil {
		return err
	}
	defer f.Close()
	fmt.Println("key        shmid      perms")
	s := bufio.NewScanner(f)
	s.Scan() // the header
	for s.Scan() {
		if c := strings.Fields(s.Text()); len(c) > 2 {
			fmt.Printf("%-10s %-10s %s\n", c[0], c[1], c[2])
		}
	}
	return s.Err()
}

// pgrep prints the processes whose name contains what.
func pgrep(what string) error {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return err
	}
	for _, n := range names {
		comm, err := os.ReadFile(n)
		pid := filepath.Base(filepath.Dir(n))
		if err == nil && strings.Contains(string(comm), what) && pid != fmt.Sprint(os.Getpid()) {
			fmt.Println(pid)
		}
	}
	return nil
}
