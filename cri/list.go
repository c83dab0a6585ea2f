package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// pieceBytes is how much goes into one message of a streamed list.
const pieceBytes = 1 << 20

// inPieces sends items in messages of about pieceBytes, at least one item
// each, and none at all for an empty list.
func inPieces[T proto.Message](items []T, send func([]T) error) error {
	for len(items) > 0 {
		n, size := 0, 0
		for n < len(items) && (n == 0 || size < pieceBytes) {
			size += proto.Size(items[n])
			n++
		}
		if err := send(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

// infoJSON is the verbose part of a status, in the shape crictl expects.
func infoJSON(v any) (map[string]string, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode verbose status: %w", err)
	}
	return map[string]string{"info": string(data)}, nil
}

func now() time.Time { return time.Now() }

// isNamespace reports whether path is a pinned namespace.
func isNamespace(path string) bool {
	const nsfs = 0x6e736673
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && uint32(st.Type) == nsfs
}

func readBootID(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}
