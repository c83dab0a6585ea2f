package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// code is the only place where error classes become gRPC codes.
func code(err error) codes.Code {
	switch {
	case err == nil:
		return codes.OK
	case errors.Is(err, context.DeadlineExceeded) || errdefs.IsDeadlineExceeded(err):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled) || errdefs.IsCanceled(err):
		return codes.Canceled
	case errdefs.IsInvalidArgument(err):
		return codes.InvalidArgument
	case errdefs.IsNotFound(err):
		return codes.NotFound
	case errdefs.IsAlreadyExists(err):
		return codes.AlreadyExists
	case errdefs.IsFailedPrecondition(err):
		return codes.FailedPrecondition
	case errdefs.IsUnavailable(err):
		return codes.Unavailable
	case errdefs.IsNotImplemented(err):
		return codes.Unimplemented
	case errdefs.IsResourceExhausted(err) || exhausted(err):
		return codes.ResourceExhausted
	case errdefs.IsPermissionDenied(err):
		return codes.PermissionDenied
	case errdefs.IsUnauthorized(err):
		return codes.Unauthenticated
	case errdefs.IsOutOfRange(err):
		return codes.OutOfRange
	case errdefs.IsDataLoss(err):
		return codes.DataLoss
	case errdefs.IsAborted(err):
		return codes.Aborted
	}
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) && s.GRPCStatus().Code() != codes.Unknown {
		return s.GRPCStatus().Code()
	}
	return codes.Internal
}

// exhausted: the kernel says that the host has no more of something.
func exhausted(err error) bool {
	return slices.ContainsFunc([]syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM},
		func(n syscall.Errno) bool { return errors.Is(err, n) })
}

func toGRPC(err error) error {
	if err == nil {
		return nil
	}
	return status.Error(code(err), err.Error())
}

// edge turns errors and panics of handlers into gRPC answers and logs them.
type edge struct{ log *slog.Logger }

func (e edge) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	begin := time.Now()
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, e.panicked(ctx, info.FullMethod, p)
			return
		}
		e.report(ctx, info.FullMethod, begin, err)
		err = toGRPC(err)
	}()
	return next(ctx, req)
}

func (e edge) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	begin := time.Now()
	defer func() {
		if p := recover(); p != nil {
			err = e.panicked(ss.Context(), info.FullMethod, p)
			return
		}
		e.report(ss.Context(), info.FullMethod, begin, err)
		err = toGRPC(err)
	}()
	return next(srv, ss)
}

func (e edge) panicked(ctx context.Context, method string, p any) error {
	e.log.ErrorContext(ctx, "handler panicked", "method", method, "panic", p, "stack", string(debug.Stack()))
	return status.Error(codes.Internal, fmt.Sprintf("%s: internal fault (%v); the daemon goes on, its log has the details", method, p))
}

func (e edge) report(ctx context.Context, method string, begin time.Time, err error) {
	if err == nil {
		if e.log.Enabled(ctx, slog.LevelDebug) {
			e.log.DebugContext(ctx, "answered", "method", method, "took", time.Since(begin))
		}
		return
	}
	level := slog.LevelError
	switch code(err) {
	case codes.NotFound, codes.Unimplemented, codes.Canceled:
		level = slog.LevelDebug
	case codes.InvalidArgument, codes.AlreadyExists, codes.FailedPrecondition, codes.DeadlineExceeded:
		level = slog.LevelWarn
	}
	e.log.Log(ctx, level, "refused or failed", "method", method, "took", time.Since(begin), "code", code(err).String(), "err", err)
}

// recovered turns a panic of a goroutine that serves a caller into an error.
func recovered(log *slog.Logger, what string, err *error) {
	if p := recover(); p != nil {
		log.Error("panic", "in", what, "panic", p, "stack", string(debug.Stack()))
		*err = fmt.Errorf("%s: internal fault: %v: %w", what, p, errdefs.ErrInternal)
	}
}
