package node

import (
	"time"

	"google.golang.org/grpc/backoff"
)

// fastBackoff reconnects quickly: tests restart the daemon all the time.
var fastBackoff = backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.3, MaxDelay: 100 * time.Millisecond}
