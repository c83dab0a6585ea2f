package main

import (
	"fmt"
	"os"

	"github.com/nodeagent/nodeagent/config"
	"github.com/spf13/cobra"
)

func newConfigCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print or check the configuration",
	}
	cmd.AddCommand(&cobra.Command{
		Use:     "default",
		Short:   "Print the default configuration with every field explained",
		Example: "  nodeagent config default > /etc/nodeagent/config.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(config.Default().Document())
			return err
		},
	}, &cobra.Command{
		Use:   "validate [file]",
		Short: "Check a configuration file and report every fault",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := a.configPath
			if len(args) == 1 {
				path = args[0]
				if _, err := os.Stat(path); err != nil {
					return fmt.Errorf("read configuration: %w", err)
				}
			}
			c, err := config.Load(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is valid: CRI on %s\n", path, c.CRI.Socket)
			return nil
		},
	})
	return cmd
}
