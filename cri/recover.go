package cri

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/nodeagent/nodeagent/cri/store"
	selinux "github.com/opencontainers/selinux/go-selinux"
)

// Recover takes over what an earlier process left: it reads records, intents
// and what the shim has, takes over exits, finishes removals, removes what is
// half-made, and gives back everything that belongs to nobody. It comes before
// Serve; nothing is removed before everything has been read.
func (s *Server) Recover(ctx context.Context) error {
	for _, dir := range []string{s.intentDir(), filepath.Join(s.cfg.State, "sandboxes")} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return fmt.Errorf("recover: %w", err)
		}
	}
	rebooted, err := s.noteBoot()
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	sandboxes, containers, refused, err := s.db.Load()
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	for id, r := range refused {
		s.log.Error("a record cannot be read; it is kept, and what belongs to it is left alone", "id", id, "err", r.Err)
	}
	for id := range refused {
		s.refused[id] = true
	}
	s.work.Go(func() { s.exitLoop(s.life) })
	intents, junk, err := s.readIntents()
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if err := s.cfg.Runtime.Ready(ctx); err != nil {
		return fmt.Errorf("recover: wait for the shim: %w", err)
	}
	processes, err := s.cfg.Runtime.List(ctx)
	if err != nil {
		return fmt.Errorf("recover: list what the shim has: %w", err)
	}
	live := map[string]Process{}
	for _, p := range processes {
		live[p.ID] = p
	}
	s.log.Info("recovering", "sandboxes", len(sandboxes), "containers", len(containers), "processes", len(processes), "intents", len(intents), "rebooted", rebooted)

	// First, because it makes the paths of pinned namespaces valid again.
	if err := s.reconcileNamespaces(ctx, sandboxes, refused); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	s.adoptSandboxes(sandboxes, live)
	s.regroup(ctx)
	s.adoptContainers(ctx, containers, live, refused)
	s.dropForeign(ctx, live, refused)
	s.dropHalfMade(ctx, intents, refused)
	for _, name := range junk {
		os.Remove(filepath.Join(s.intentDir(), name))
	}
	if err := s.reconcile(ctx, refused); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	s.finishStops(ctx)
	close(s.ready)
	s.log.Info("recovered", "sandboxes", s.sandboxes.Len(), "containers", s.containers.Len())
	return nil
}

// noteBoot compares the boot that State belongs to with this one; State of an
// earlier boot is stale (it need not be on a tmpfs).
func (s *Server) noteBoot() (rebooted bool, err error) {
	path := filepath.Join(s.cfg.State, "boot")
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("read the boot that State belongs to: %w", err)
	}
	if string(old) == s.boot {
		return false, nil
	}
	if len(old) > 0 {
		s.log.Info("the host was restarted", "before", string(old), "now", s.boot)
	}
	// Intents and marks are about kernel objects of that boot.
	if err := os.RemoveAll(s.intentDir()); err != nil {
		return true, err
	}
	if err := os.MkdirAll(s.intentDir(), 0o711); err != nil {
		return true, err
	}
	return true, os.WriteFile(path, []byte(s.boot), 0o600)
}

func (s *Server) adoptSandboxes(records []*store.Sandbox, live map[string]Process) {
	slices.SortFunc(records, func(a, b *store.Sandbox) int { return a.CreatedAt.Compare(b.CreatedAt) })
	for _, rec := range records {
		b := &sandbox{id: rec.ID, key: sandboxKey(rec.Config.GetMetadata()), op: newOpLock(), rec: rec}
		p, running := live[rec.ID]
		switch {
		case rec.Boot != s.boot:
			b.stopped = true
		case s.marked(rec.ID, markStopped):
			b.stopped = true
		case rec.Pause && (!running || p.Exit != nil):
			s.log.Warn("the process that held a pod's PID namespace is gone", "sandbox", rec.ID)
			b.stopped = true
		case rec.Namespaces.Net != "" && !isNamespace(rec.Namespaces.Net):
			s.log.Warn("a pod's network namespace is gone", "sandbox", rec.ID, "path", rec.Namespaces.Net)
			b.stopped = true
		case rec.Pause:
			b.pausePid = p.Pid
		}
		if rec.Label != "" {
			if err := selinux.ReserveLabelV2(rec.Label); err != nil {
				s.log.Warn("a pod's SELinux categories could not be reserved, another may get them", "sandbox", rec.ID, "label", rec.Label, "err", err)
			}
		}
		s.sandboxes.Add(rec.ID, b)
		s.sandboxNames.take(b.key, rec.ID, rec.Digest, b.usable)
	}
}

func (s *Server) adoptContainers(ctx context.Context, records []*store.Container, live map[string]Process, refused map[string]store.Refused) {
	slices.SortFunc(records, func(a, b *store.Container) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	for _, rec := range records {
		b, err := s.sandboxes.Get(rec.SandboxID)
		if err != nil || b.id != rec.SandboxID {
			if _, kept := refused[rec.SandboxID]; kept { // so is this
				refused[rec.ID] = store.Refused{Err: err, Images: append([]string{rec.ImageID}, rec.ImageVolumes...)}
				continue
			}
			s.log.Warn("a container's sandbox has no record; the container is removed", "container", rec.ID, "sandbox", rec.SandboxID)
			s.forceRemove(ctx, rec.ID)
			continue
		}
		s.refreshFacts(ctx, rec, b.record().Boot, live)
		c := newContainer(b, rec, nil)
		s.containers.Add(rec.ID, c)
		b.addContainer(c)
		s.containerNames.take(c.key, rec.ID, rec.Digest, c.usable)
	}
}

// refreshFacts brings a record up to date with what the shim knows.
func (s *Server) refreshFacts(ctx context.Context, rec *store.Container, boot string, live map[string]Process) {
	p, known := live[rec.ID]
	if rec.Exit != nil {
		return
	}
	if known {
		if rec.Started == nil {
			rec.Started = &store.Started{Pid: p.Pid, StartTime: p.StartTime, At: p.StartedAt}
		}
		if p.Exit == nil {
			s.log.Debug("a container runs on", "container", rec.ID, "pid", p.Pid)
			return
		}
		rec.Exit = exitRecord(*p.Exit)
	} else {
		if rec.Started == nil && boot == s.boot {
			return // created, waiting to be started
		}
		e, err := s.cfg.Runtime.Delete(ctx, rec.ID) // it may have the exit on disk
		if err != nil && !errdefs.IsNotFound(err) {
			s.log.Warn("cannot ask the shim how a container ended", "container", rec.ID, "err", err)
		}
		rec.Exit = exitRecord(e)
		if !e.Known && boot != s.boot {
			rec.Exit.Message = "the host was restarted while the container existed; how it ended is not known"
		}
	}
	s.log.Info("a container ended while nobody looked", "container", rec.ID, "code", rec.Exit.Code, "known", rec.Exit.Known)
	if err := s.db.PutContainer(rec, nil); err != nil {
		s.log.Error("cannot record an exit; the shim keeps it", "container", rec.ID, "err", err)
	}
}

// dropForeign removes processes that belong to no record.
func (s *Server) dropForeign(ctx context.Context, live map[string]Process, refused map[string]store.Refused) {
	for id := range live {
		if _, kept := refused[id]; kept {
			continue
		}
		if _, err := s.containers.Get(id); err == nil {
			continue
		}
		if _, err := s.sandboxes.Get(id); err == nil {
			continue
		}
		s.log.Info("removing a process of a half-made or removed container", "id", id)
		if err := s.deleteProcess(ctx, id); err != nil {
			s.log.Warn("cannot remove a leftover process yet, will try again", "id", id, "err", err)
			s.janitor.add("leftover process", id, func(ctx context.Context) error { return s.deleteProcess(ctx, id) })
		}
	}
}

// dropHalfMade removes what has an intent and no record, and finishes removals
// that were begun.
func (s *Server) dropHalfMade(ctx context.Context, intents []intent, refused map[string]store.Refused) {
	slices.SortFunc(intents, func(a, b intent) int { return cmp.Compare(a.Kind, b.Kind) }) // containers first
	for _, in := range intents {
		if _, kept := refused[in.ID]; kept {
			continue
		}
		if c, err := s.containers.Get(in.ID); err == nil {
			if s.marked(in.ID, markRemoving) {
				s.finish(ctx, "removal of a container", in.ID, func(ctx context.Context) error { return s.removeContainer(ctx, c) })
			}
			continue
		}
		if b, err := s.sandboxes.Get(in.ID); err == nil {
			if s.marked(in.ID, markRemoving) {
				s.finish(ctx, "removal of a sandbox", in.ID, func(ctx context.Context) error {
					unlock, err := b.op.alone(ctx, "finish removal")
					if err != nil {
						return err
					}
					defer unlock()
					return s.removeSandboxLocked(ctx, b)
				})
			}
			continue
		}
		s.finish(ctx, "half-made "+in.Kind, in.ID, func(ctx context.Context) error { return s.undoIntent(ctx, in) })
	}
}

// undoIntent removes everything that the intent's object may have had. Network
// and namespaces that it cannot name are given back by reconcile.
func (s *Server) undoIntent(ctx context.Context, in intent) error {
	errs := []error{s.deleteProcess(ctx, in.ID)}
	if in.Kind != kindSandbox {
		errs = append(errs, s.cfg.Rootfs.Unmount(ctx, in.ID))
	}
	if in.Kind != kindContainer {
		if in.Network != nil {
			errs = append(errs, s.cfg.Network.Teardown(ctx, NetworkRequest{
				SandboxID: in.ID, PodNamespace: in.Network.Namespace, PodName: in.Network.Name, PodUID: in.Network.UID,
				Annotations: in.Network.Annotations, CgroupParent: in.Cgroup,
			}, NetworkResult{}))
		}
		errs = append(errs, removeSandboxFiles(s.sandboxDir(in.ID)))
		if in.Cgroup != "" && !s.shared(in.Cgroup) {
			errs = append(errs, s.cfg.Cgroups.RemovePod(ctx, in.Cgroup))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return s.dropIntent(in.ID)
}

// forceRemove removes a container whose sandbox is gone.
func (s *Server) forceRemove(ctx context.Context, id string) {
	s.finish(ctx, "container without sandbox", id, func(ctx context.Context) error {
		if err := errors.Join(s.deleteProcess(ctx, id), s.cfg.Rootfs.Unmount(ctx, id)); err != nil {
			return err
		}
		if err := s.db.DeleteContainer(id); err != nil {
			return err
		}
		return s.dropIntent(id)
	})
}

// finish does a piece of cleaning now, or has it tried again later.
func (s *Server) finish(ctx context.Context, what, id string, do func(context.Context) error) {
	tctx, cancel := context.WithTimeout(ctx, undoTimeout)
	defer cancel()
	if err := do(tctx); err != nil {
		s.log.Warn("cannot clean yet, will try again", "what", what, "id", id, "err", err)
		s.janitor.add(what, id, do)
		return
	}
	s.log.Info("cleaned", "what", what, "id", id)
}

// reconcileNamespaces keeps the namespaces of all sandboxes of this boot.
func (s *Server) reconcileNamespaces(ctx context.Context, records []*store.Sandbox, refused map[string]store.Refused) error {
	var keep []string
	for _, rec := range records {
		if rec.Boot == s.boot && rec.Namespaces.ID != "" {
			keep = append(keep, rec.Namespaces.ID)
		}
	}
	for _, r := range refused {
		if r.NamespaceID != "" {
			keep = append(keep, r.NamespaceID)
		}
	}
	err := s.cfg.Namespaces.Reconcile(ctx, keep)
	if errdefs.IsNotFound(err) {
		s.log.Info("some sandboxes have no namespaces any more", "err", err) // stopped, or lost: adoptSandboxes looks
		return nil
	}
	return err
}

// reconcile has the network and the root filesystems give back what belongs to
// no living object.
func (s *Server) reconcile(ctx context.Context, refused map[string]store.Refused) error {
	var requests []NetworkRequest
	results := map[string]NetworkResult{}
	for _, b := range s.sandboxes.All() {
		rec := b.record()
		if rec.Boot != s.boot {
			continue
		}
		if !hostNetwork(rec.Config) && !s.isClean(b) {
			requests = append(requests, s.networkRequest(rec))
			results[rec.ID] = networkResult(rec.Network)
		}
	}
	images := map[string][]string{}
	for _, c := range s.containers.All() {
		rec := c.record()
		images[rec.ID] = append([]string{rec.ImageID}, rec.ImageVolumes...)
	}
	for id, r := range refused {
		images[id] = r.Images // sandboxes too; nothing of the kind is there
	}
	err := errors.Join(s.cfg.Rootfs.Restore(ctx, images), s.sweepSandboxDirs(refused))
	if len(refused) > 0 {
		// Whose addresses those are cannot be told.
		s.log.Error("there are records that cannot be read: no address is given back that might belong to them", "records", len(refused))
		return err
	}
	if e := s.cfg.Network.Reconcile(ctx, requests, results); e != nil {
		// Pods that need no network can be run all the same; whether others can
		// is what Network.Status says.
		s.log.Error("the network could not be compared with the pods; what pods that are gone had may stay until the next start", "err", e)
	}
	return err
}

// regroup counts all sandboxes as users of their cgroups again.
func (s *Server) regroup(ctx context.Context) {
	for _, b := range s.sandboxes.All() {
		rec := b.record()
		if rec.Boot != s.boot {
			continue
		}
		limits, err := podResources(rec.Config.GetLinux(), s.cfg.Host)
		if err == nil {
			err = s.cfg.Cgroups.EnsurePod(ctx, rec.CgroupParent, limits)
		}
		if err != nil {
			s.log.Warn("cannot take over a pod's cgroup", "sandbox", rec.ID, "path", rec.CgroupParent, "err", err)
		}
	}
}

// shared reports whether a sandbox uses the cgroup.
func (s *Server) shared(cgroup string) bool {
	for _, b := range s.sandboxes.All() {
		if rec := b.record(); rec.CgroupParent == cgroup && rec.Boot == s.boot {
			return true
		}
	}
	return false
}

// isClean reports whether a stopped sandbox has nothing left in the kernel.
func (s *Server) isClean(b *sandbox) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.clean
}

// sweepSandboxDirs removes directories of sandboxes that do not exist.
func (s *Server) sweepSandboxDirs(refused map[string]store.Refused) error {
	dir := filepath.Join(s.cfg.State, "sandboxes")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep sandbox directories: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if _, kept := refused[e.Name()]; kept {
			continue
		}
		if b, err := s.sandboxes.Get(e.Name()); err == nil && b.id == e.Name() {
			continue
		}
		errs = append(errs, removeSandboxFiles(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}

// finishStops makes sandboxes that are not ready clean: stops that were cut
// short, pods whose processes are gone, pods of an earlier boot.
func (s *Server) finishStops(ctx context.Context) {
	for _, b := range s.sandboxes.All() {
		if b.usable() == nil {
			continue
		}
		s.finish(ctx, "stopped sandbox", b.id, func(ctx context.Context) error {
			unlock, err := b.op.alone(ctx, "finish stop")
			if err != nil {
				return err
			}
			defer unlock()
			return s.stopSandboxLocked(ctx, b)
		})
	}
}
