package main

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// downAtOnce is how many pods are stopped at the same time.
const downAtOnce = 8

func newDownCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Stop and remove all pods",
		Long: `Stops and removes every pod of the running daemon. Stopping the daemon itself
leaves them running; after this it leaves nothing behind. Images stay.

Containers get SIGKILL: whoever wants grace drains the node first.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withCRI(func(conn *grpc.ClientConn) error {
				n, err := removePods(cmd.Context(), runtimeapi.NewRuntimeServiceClient(conn))
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "removed %d pods\n", n)
				return nil
			})
		},
	}
}

// removePods stops and removes all pods and says how many; it goes on after an
// error.
func removePods(ctx context.Context, rt runtimeapi.RuntimeServiceClient) (int, error) {
	list, err := rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return 0, err
	}
	var wg sync.WaitGroup
	errs := make([]error, len(list.Items))
	slots := make(chan struct{}, downAtOnce)
	for i, p := range list.Items {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			_, err := rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.Id})
			if err == nil {
				_, err = rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.Id})
			}
			if err != nil {
				errs[i] = fmt.Errorf("pod %s/%s: %w", p.GetMetadata().GetNamespace(), p.GetMetadata().GetName(), err)
			}
		})
	}
	wg.Wait()
	return len(list.Items), errors.Join(errs...)
}
