package cgroups

type watcher struct{}
