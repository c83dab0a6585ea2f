package objects

import "time"

// Lists are objects as files hold them.
type Lists struct {
	Namespaces []Namespace
	Pods       []Pod
	Policies   []*Policy
}

// Change is what became of a cluster's objects. Who has handed it over must not
// change what is in it.
type Change struct {
	Namespaces Delta[string, *Namespace]
	Pods       Delta[PodKey, *Pod]
	Policies   Delta[PodKey, *Policy]
	Seen       time.Time // when the first of it was heard of; zero: now
}

// Delta is what became of the objects of one kind. The zero Delta: nothing.
type Delta[K comparable, V any] struct {
	Whole bool // Put is all there is
	Put   map[K]V
	Gone  map[K]bool // unless Whole
}

// Empty says that nothing happened.
func (d *Delta[K, V]) Empty() bool { return !d.Whole && len(d.Put)+len(d.Gone) == 0 }

// Set adds or replaces an object.
func (d *Delta[K, V]) Set(key K, v V) {
	if d.Put == nil {
		d.Put = map[K]V{}
	}
	d.Put[key] = v
	delete(d.Gone, key)
}

// Delete removes an object.
func (d *Delta[K, V]) Delete(key K) {
	delete(d.Put, key)
	if d.Whole {
		return
	}
	if d.Gone == nil {
		d.Gone = map[K]bool{}
	}
	d.Gone[key] = true
}

// Replace forgets what came before: all is all there is.
func (d *Delta[K, V]) Replace(all map[K]V) { *d = Delta[K, V]{Whole: true, Put: all} }

// Into brings known up to date and calls touched with each key that may have
// changed. It returns the map to be used from now on.
func (d *Delta[K, V]) Into(known map[K]V, touched func(K)) map[K]V {
	if !d.Whole {
		if known == nil {
			known = map[K]V{}
		}
		for k, v := range d.Put {
			known[k] = v
			touched(k)
		}
		for k := range d.Gone {
			delete(known, k)
			touched(k)
		}
		return known
	}
	for k := range known {
		if _, stays := d.Put[k]; !stays {
			touched(k)
		}
	}
	for k := range d.Put {
		touched(k)
	}
	if d.Put == nil {
		return map[K]V{}
	}
	return d.Put
}

// Empty says that nothing happened.
func (c *Change) Empty() bool { return c.Namespaces.Empty() && c.Pods.Empty() && c.Policies.Empty() }

// Whole is the change to what the lists say. Of several objects with one name
// the last counts.
func (l Lists) Whole() Change {
	namespaces, pods, policies := make(map[string]*Namespace), make(map[PodKey]*Pod, len(l.Pods)), make(map[PodKey]*Policy, len(l.Policies))
	for i := range l.Namespaces {
		namespaces[l.Namespaces[i].Name] = &l.Namespaces[i]
	}
	for i := range l.Pods {
		pods[l.Pods[i].PodKey] = &l.Pods[i]
	}
	for _, p := range l.Policies {
		policies[PodKey{Namespace: p.Namespace, Name: p.Name}] = p
	}
	var c Change
	c.Namespaces.Replace(namespaces)
	c.Pods.Replace(pods)
	c.Policies.Replace(policies)
	return c
}
