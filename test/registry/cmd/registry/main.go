// Command registry serves a small OCI registry for the demo and for tests. It
// prints its address on one line and serves until SIGINT or SIGTERM.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/nodeagent/nodeagent/test/registry"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:5000", "address to listen on")
	dir := flag.String("dir", "", "directory for blobs (default: memory)")
	user := flag.String("user", "", "user name to require")
	password := flag.String("password", "", "password to require")
	bearer := flag.Bool("bearer", false, "use token authentication instead of basic")
	verbose := flag.Bool("v", false, "log requests to stderr")
	flag.Parse()
	var log io.Writer
	if *verbose {
		log = os.Stderr
	}
	if err := run(registry.Config{Addr: *addr, Dir: *dir, User: *user, Password: *password, Bearer: *bearer, Log: log}); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

func run(cfg registry.Config) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	s, err := registry.Start(cfg)
	if err != nil {
		return err
	}
	fmt.Println(s.Addr)
	<-stop
	return s.Close()
}
