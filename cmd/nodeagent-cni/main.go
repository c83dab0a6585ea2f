// Command nodeagent-cni is the built-in network of nodeagent as a CNI plugin for other runtimes.
// A runtime calls it as the CNI specification says: command and container in the environment, the
// network's configuration on standard input. Its configuration is described at plugin.Conf.
package main

import "github.com/nodeagent/nodeagent/cni/plugin"

func main() { plugin.Main() }
