package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/nodeagent/nodeagent/config"
	"github.com/nodeagent/nodeagent/cri/images"
)

func newReloadCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the daemon read its configuration again",
		Long: `Has the daemon read its configuration file again and says what it took over and
what waits for a restart. A file with faults is refused as a whole: the daemon
goes on with what it has. Pods do not notice.

"nodeagent config default" marks the fields that a reload applies.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.config()
			if err != nil && a.configPath != config.DefaultPath {
				return err
			}
			if err != nil {
				cfg = config.Default() // the daemon says what is wrong
			}
			out, err := callReload(cmd.Context(), cfg.AdminSocket())
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), out)
			return nil
		},
	}
}

// reloaded says what became of a reload, by paths in the file.
type reloaded struct {
	Applied []string `json:"applied"`
	Waiting []string `json:"waiting"` // for a restart
}

func (r reloaded) String() string {
	text := "nothing to apply"
	if len(r.Applied) > 0 {
		text = "applied: " + strings.Join(r.Applied, ", ")
	}
	if len(r.Waiting) > 0 {
		text += "; a restart is needed for: " + strings.Join(r.Waiting, ", ")
	}
	return text
}

// reloader applies a changed file to what runs.
type reloader struct {
	path   string // of the file
	log    logging
	notify func(state string) // to systemd
	// Set before the first reload.
	images  func(images.Settings) error
	uplinks func(context.Context, []string) error // nil: policy is off

	mu    sync.Mutex    // one reload at a time; guards what follows
	cfg   config.Config // in force
	waits []string
}

// reload takes over what the file says. An error means that nothing changed.
func (r *reloader) reload(ctx context.Context) (reloaded, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.notify(daemon.SdNotifyReloading + "\n" + daemon.SdNotifyMonotonicUsec())
	defer r.notify(daemon.SdNotifyReady)
	out, err := r.take(ctx)
	if err != nil {
		r.log.Error("the configuration was not reloaded, the former one stays in force", "path", r.path, "err", err)
		return out, fmt.Errorf("reload: the former configuration stays in force: %w", err)
	}
	r.log.Info("configuration reloaded", "path", r.path, "applied", out.Applied)
	if len(out.Waiting) > 0 {
		r.log.Warn("changes of the configuration wait for a restart of the daemon", "path", r.path, "fields", out.Waiting)
	}
	return out, nil
}

func (r *reloader) take(ctx context.Context) (out reloaded, err error) {
	file, err := config.Load(r.path)
	if err != nil {
		return out, err
	}
	next, changes := r.cfg.Reload(file)
	if err := r.apply(ctx, next); err != nil {
		return out, errors.Join(err, r.apply(context.WithoutCancel(ctx), r.cfg))
	}
	for _, c := range changes {
		if c.Live {
			out.Applied = append(out.Applied, c.Path)
		} else {
			out.Waiting = append(out.Waiting, c.Path)
		}
	}
	r.cfg, r.waits = next, out.Waiting
	return out, nil
}

// apply puts the live fields of c in force; what can fail goes first.
func (r *reloader) apply(ctx context.Context, c config.Config) error {
	if err := r.images(imageSettings(c)); err != nil {
		return err
	}
	if r.uplinks != nil {
		if err := r.uplinks(ctx, uplinkPatterns(c)); err != nil {
			return err
		}
	}
	r.log.level.Set(logLevel(c.Log.Level))
	setLibraryLevel(r.log.Logger)
	return nil
}

// waiting are the fields that a restart would apply.
func (r *reloader) waiting() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waits
}

// MarshalJSON shows the configuration in force, for `crictl info`.
func (r *reloader) MarshalJSON() ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cfg.MarshalJSON()
}

// onSignal reloads at each signal until ctx ends; the log has what came of it.
func (r *reloader) onSignal(ctx context.Context, hup <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			_, _ = r.reload(ctx)
		}
	}
}

// ServeHTTP reloads for the administrator.
func (r *reloader) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	out, err := r.reload(req.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(out) // the client may be gone
}

func callReload(ctx context.Context, socket string) (out reloaded, err error) {
	body, err := postAdmin(ctx, socket, adminReload, struct{}{})
	if err != nil {
		return out, err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&out); err != nil {
		return out, fmt.Errorf("the daemon's answer broke off: %w", err)
	}
	return out, nil
}
