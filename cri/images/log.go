package images

import (
	"context"
	"io"
	"log/slog"

	ctdlog "github.com/containerd/log"
	"github.com/sirupsen/logrus"
	logrusslog "github.com/sirupsen/logrus/hooks/slog"
)

// containerdLog makes containerd's libraries log to ours where they take their
// logger from the context. What they say is detail, except warnings.
func containerdLog(to *slog.Logger) *ctdlog.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.WarnLevel)
	if to.Enabled(context.Background(), slog.LevelDebug) {
		l.SetLevel(logrus.DebugLevel)
	}
	l.AddHook(logrusslog.NewHook(to, &logrusslog.HookOptions{LevelMapper: func(level logrus.Level) slog.Level {
		if level <= logrus.WarnLevel {
			return slog.LevelWarn
		}
		return slog.LevelDebug
	}}))
	return logrus.NewEntry(l)
}
