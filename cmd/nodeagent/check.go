package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/nodeagent/nodeagent/cmd/nodeagent/internal/probe"
	"github.com/spf13/cobra"
)

func newCheckCommand(a *app) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check what the kernel and the host offer, and what is lost without it",
		Long: `Tries everything the daemon may need of the kernel and the host, and says for
each missing thing what is lost. Nothing is left behind. The exit code is 1
only if something essential is missing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := oneOfFlag("output", output, "table", "json"); err != nil {
				return err
			}
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errors.New("the checks need root, as the daemon does: run with sudo")
			}
			results := probe.Run(probe.Options{Dir: nearest(cfg.Root), HoldUserNamespace: holdUserNamespace})
			return reportCheck(cmd.OutOrStdout(), output, results)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "`format`: table or json")
	return cmd
}

// nearest is dir, or the directory it would be made in: checking must not
// make it.
func nearest(dir string) string {
	for {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func reportCheck(w io.Writer, format string, results []probe.Result) error {
	ok := probe.Complete(results)
	if format == "json" {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		if err := enc.Encode(map[string]any{"ok": ok, "checks": results}); err != nil {
			return err
		}
	} else {
		printChecks(w, results)
	}
	if !ok {
		return exitError{1}
	}
	return nil
}

// printChecks writes a table with one row a check; what is missing gets a
// second line with what that costs.
func printChecks(w io.Writer, results []probe.Result) {
	s := styleFor(w)
	group, missing, essential := "", 0, 0
	for _, r := range results {
		if r.Group != group {
			group = r.Group
			fmt.Fprintf(w, "%s\n", s.bold(group))
		}
		if r.Found {
			fmt.Fprintf(w, "  %s  %-30s %s\n", s.green("found  "), r.Name, s.dim(r.Detail))
			continue
		}
		word, lost := s.yellow("missing"), "lost: "
		missing++
		if r.Essential {
			word, lost = s.red("MISSING"), "essential, lost: "
			essential++
		}
		fmt.Fprintf(w, "  %s  %-30s %s\n", word, r.Name, r.Detail)
		fmt.Fprintf(w, "  %-39s  %s%s\n", "", lost, r.Lost)
	}
	switch {
	case essential > 0:
		fmt.Fprintf(w, "\n%d of %d missing, %d of them essential: nodeagent will not work here.\n", missing, len(results), essential)
	case missing > 0:
		fmt.Fprintf(w, "\nEverything essential is here; %d of %d are missing.\n", missing, len(results))
	default:
		fmt.Fprintf(w, "\nEverything is here.\n")
	}
}
