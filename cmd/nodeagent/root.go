package main

import (
	"fmt"
	"strings"

	"github.com/nodeagent/nodeagent/config"
	"github.com/spf13/cobra"
)

// app is what the commands share: the flags that are needed before the
// configuration is read.
type app struct {
	configPath string
}

func (a *app) config() (config.Config, error) { return config.Load(a.configPath) }

func newRootCommand() *cobra.Command {
	a := &app{}
	root := &cobra.Command{
		Use:   "nodeagent",
		Short: "A Kubernetes node in one daemon",
		Long: `nodeagent runs pods: it is a container runtime (CRI) with images, network,
cgroups and metrics in one daemon.

Everything but the place of the configuration file is in the configuration
file; "nodeagent config default" prints it with all its fields explained.`,
		SilenceUsage:      true,
		SilenceErrors:     true,
		DisableAutoGenTag: true,
	}
	root.PersistentFlags().StringVar(&a.configPath, "config", config.DefaultPath, "configuration `file`; the default one may be absent")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; see %q", err, cmd.CommandPath()+" --help")
	})
	root.AddCommand(
		newRunCommand(a),
		newReloadCommand(a),
		newDownCommand(a),
		newCheckCommand(a),
		newConfigCommand(a),
		newImageCommand(a),
		newPolicyCommand(a),
		newCertCommand(a),
		newVersionCommand(),
		newManCommand(),
		newHoldCommand(),
	)
	return root
}

// oneOfFlag checks a flag with a closed choice.
func oneOfFlag(name, value string, allowed ...string) error {
	for _, a := range allowed {
		if value == a {
			return nil
		}
	}
	return fmt.Errorf("--%s %q is not one of %s", name, value, strings.Join(allowed, ", "))
}
