# Runs the steps in the machine, in order, and goes on after a reboot. All that
# it prints goes to the host.
cd /payload || exit 1
mkdir -p done

if ! [ -e done/.facts ]; then
	cgroups=v1
	[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] && cgroups=v2
	. /etc/os-release
	echo "=== FACT system: $PRETTY_NAME"
	echo "=== FACT kernel: $(uname -r)"
	echo "=== FACT cgroups: $cgroups"
	echo "=== FACT init: $(systemctl --version | head -n 1)"
	touch done/.facts
fi

# The NIC: the wire between two machines, or a stand-in for one.
role=$(sed -n 's/.*vm\.role=\([a-z]*\).*/\1/p' /proc/cmdline)
export NODEAGENT_ROLE="$role"
case $role in
a) host=11 ;;
b) host=12 ;;
*) host=10 && ip link add eth0 type dummy ;;
esac
until [ -e /sys/class/net/eth0 ]; do sleep 0.2; done
ip addr add 192.0.2.$host/24 dev eth0
ip -6 addr add 2001:db8::$host/64 dev eth0 nodad
ip link set eth0 up
ip route add default via 192.0.2.1
ip -6 route add default via 2001:db8::1 || ip -6 route add default dev eth0

number=0
while IFS='|' read -r name seconds command; do
	number=$((number + 1))
	[ -e "done/$number" ] && continue
	touch "done/$number"
	if [ "$command" = reboot ]; then
		sync
		systemctl reboot
		exit
	fi
	echo "=== STEP $name"
	# The clock may be set by a test: the uptime tells how long it took.
	read -r begin _ < /proc/uptime
	timeout -k 20 "$seconds" sh -c "$command" < /dev/null
	code=$?
	read -r end _ < /proc/uptime
	if [ $code != 0 ]; then
		echo "--- the journal ends:"
		journalctl --sync
		journalctl -u nodeagent -n 400 --no-pager -o short-monotonic
		dmesg | tail -n 5
	fi
	echo "=== ENDED $(echo "$name" | tr ' ' _) $code $((${end%.*} - ${begin%.*}))"
done < steps
systemctl poweroff
