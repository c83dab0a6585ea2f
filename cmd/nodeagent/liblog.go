package main

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"slices"

	"github.com/sirupsen/logrus"
	"k8s.io/klog/v2"
)

// adoptLibraryLogs makes what libraries log through their global loggers
// (containerd's through logrus, Kubernetes' through klog) part of ours.
func adoptLibraryLogs(log *slog.Logger) {
	logrus.SetOutput(io.Discard)
	logrus.SetFormatter(silent{})
	logrus.AddHook(logrusHook{log})
	setLibraryLevel(log)
	klog.SetSlogLogger(log)
}

// setLibraryLevel spares the making of lines that log does not want.
func setLibraryLevel(log *slog.Logger) {
	level := logrus.InfoLevel
	if log.Enabled(context.Background(), slog.LevelDebug) {
		level = logrus.DebugLevel
	}
	logrus.SetLevel(level)
}

// silent spares the formatting of lines that go nowhere.
type silent struct{}

func (silent) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// logrusHook hands each entry to slog.
type logrusHook struct{ log *slog.Logger }

func (logrusHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h logrusHook) Fire(e *logrus.Entry) error {
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	var attrs []slog.Attr
	for _, k := range slices.Sorted(maps.Keys(e.Data)) {
		key := k
		if k == logrus.ErrorKey {
			key = "err"
		}
		attrs = append(attrs, slog.Any(key, e.Data[k]))
	}
	h.log.LogAttrs(ctx, slogLevel(e.Level), e.Message, attrs...)
	return nil
}

func slogLevel(l logrus.Level) slog.Level {
	switch {
	case l <= logrus.ErrorLevel:
		return slog.LevelError
	case l == logrus.WarnLevel:
		return slog.LevelWarn
	case l == logrus.InfoLevel:
		return slog.LevelInfo
	}
	return slog.LevelDebug
}
