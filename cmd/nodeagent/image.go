package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nodeagent/nodeagent/cri/images"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newImageCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Pull, import, list and remove images",
		Long:  "Asks the running daemon. Which daemon, says the configuration.",
	}
	cmd.AddCommand(newImageListCommand(a), newImageRemoveCommand(a), newImagePullCommand(a), newImageImportCommand(a))
	return cmd
}

func newImageListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the images of the node",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withImageService(func(c runtimeapi.ImageServiceClient) error {
				resp, err := c.ListImages(cmd.Context(), &runtimeapi.ListImagesRequest{})
				if err != nil {
					return err
				}
				return printImages(cmd.OutOrStdout(), resp.Images)
			})
		},
	}
}

func newImageRemoveCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "rm <image>...",
		Aliases: []string{"remove"},
		Short:   "Remove images by name, digest or id",
		Args:    cobra.MinimumNArgs(1),
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
			return a.imageNames(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withImageService(func(c runtimeapi.ImageServiceClient) error {
				for _, ref := range args {
					if err := removeImage(cmd.Context(), c, ref); err != nil {
						return err
					}
					fmt.Fprintf(cmd.OutOrStdout(), "removed %s\n", ref)
				}
				return nil
			})
		},
	}
}

// removeImage fails for an image that is not there, unlike the CRI's call: a
// person wants to know of a typing error.
func removeImage(ctx context.Context, c runtimeapi.ImageServiceClient, ref string) error {
	spec := &runtimeapi.ImageSpec{Image: ref}
	got, err := c.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
	if err != nil {
		return err
	}
	if got.Image == nil {
		return fmt.Errorf("no image %q; %q lists what there is", ref, "nodeagent image ls")
	}
	_, err = c.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec})
	return err
}

func newImagePullCommand(a *app) *cobra.Command {
	var creds string
	cmd := &cobra.Command{
		Use:   "pull <image>",
		Short: "Pull an image from its registry",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := pullRequest{Ref: args[0]}
			if creds != "" {
				user, password, ok := strings.Cut(creds, ":")
				if !ok {
					return fmt.Errorf("--creds is not user:password")
				}
				req.Auth = images.Auth{Username: user, Password: password}
			}
			return a.adminCall(cmd, adminPull, req)
		},
	}
	cmd.Flags().StringVar(&creds, "creds", "", "`user:password` for the registry")
	return cmd
}

func newImageImportCommand(a *app) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "import <file or directory>",
		Short: "Import an OCI layout directory, an OCI archive or a docker archive",
		Long: `Takes in the images of an OCI layout directory, an OCI archive or a docker
archive; archives may be compressed with gzip or zstd. "-" reads an archive from
standard input.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, cleanup, err := importPath(args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			defer cleanup()
			return a.adminCall(cmd, adminImport, importRequest{Path: path, Name: name})
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "`name` for an image that the archive gives none, or a tag only")
	return cmd
}

// importPath is where the daemon finds what arg names.
func importPath(arg string, stdin io.Reader) (path string, cleanup func(), err error) {
	if arg != "-" {
		path, err := filepath.Abs(arg)
		if err == nil {
			_, err = os.Stat(path)
		}
		return path, func() {}, err
	}
	f, err := os.CreateTemp("", "nodeagent-import-")
	if err != nil {
		return "", nil, fmt.Errorf("store standard input: %w", err)
	}
	defer f.Close()
	cleanup = func() { os.Remove(f.Name()) }
	if _, err := io.Copy(f, stdin); err != nil {
		cleanup()
		return "", nil, fmt.Errorf("store standard input: %w", err)
	}
	return f.Name(), cleanup, nil
}

// imageNames are what a shell can complete; none if no daemon answers.
func (a *app) imageNames(ctx context.Context) (names []string) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	a.withImageService(func(c runtimeapi.ImageServiceClient) error { // a shell has no use for it
		resp, err := c.ListImages(ctx, &runtimeapi.ListImagesRequest{})
		for _, img := range resp.GetImages() {
			names = append(names, img.RepoTags...)
		}
		return err
	})
	return names
}

// withImageService calls f with a client of the daemon's image service.
func (a *app) withImageService(f func(runtimeapi.ImageServiceClient) error) error {
	return a.withCRI(func(conn *grpc.ClientConn) error { return f(runtimeapi.NewImageServiceClient(conn)) })
}

// adminCall asks the daemon and shows the progress of its answer.
func (a *app) adminCall(cmd *cobra.Command, path string, req any) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	bars := newProgress(cmd.ErrOrStderr())
	got, err := callAdmin(cmd.Context(), cfg.AdminSocket(), path, req, bars.update)
	bars.finish()
	if err != nil {
		return err
	}
	for _, img := range got {
		names := img.RepoTags
		if len(names) == 0 {
			names = img.RepoDigests
		}
		if len(names) == 0 {
			names = []string{img.ID}
		}
		for _, name := range names {
			fmt.Fprintf(cmd.OutOrStdout(), "%s  %s\n", shortID(img.ID), name)
		}
	}
	return nil
}

func printImages(w io.Writer, list []*runtimeapi.Image) error {
	if len(list) == 0 {
		fmt.Fprintln(w, "no images; `nodeagent image pull` and `nodeagent image import` bring some")
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	fmt.Fprintln(t, "NAME\tID\tSIZE\tPINNED")
	for _, img := range list {
		names := img.RepoTags
		if len(names) == 0 {
			names = img.RepoDigests
		}
		if len(names) == 0 {
			names = []string{"<none>"}
		}
		pinned := ""
		if img.Pinned {
			pinned = "yes"
		}
		for _, n := range names {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", n, shortID(img.Id), humanBytes(int64(img.Size)), pinned)
		}
	}
	return t.Flush()
}

// shortID is enough of a digest for a person.
func shortID(id string) string {
	hex := strings.TrimPrefix(id, "sha256:")
	return hex[:min(12, len(hex))]
}

// humanBytes is in decimal units, as disks and registries count.
func humanBytes(n int64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.0f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}
