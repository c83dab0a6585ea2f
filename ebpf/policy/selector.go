package policy

import (
	"fmt"
	"slices"
	"strings"

	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// selector is a label selector made ready to match often.
type selector struct{ terms []term }

type term struct {
	key    string
	op     meta.LabelSelectorOperator
	values []string
}

// newSelector also returns the canonical text that equal selectors share.
func newSelector(s *meta.LabelSelector) (selector, string, error) {
	var out selector
	if s == nil {
		return out, "", fmt.Errorf("no selector")
	}
	for k, v := range s.MatchLabels {
		out.terms = append(out.terms, term{k, meta.LabelSelectorOpIn, []string{v}})
	}
	for _, e := range s.MatchExpressions {
		values := slices.Clone(e.Values)
		slices.Sort(values)
		t := term{e.Key, e.Operator, slices.Compact(values)}
		switch t.op {
		case meta.LabelSelectorOpIn, meta.LabelSelectorOpNotIn:
			if len(values) == 0 {
				return out, "", fmt.Errorf("label %q: operator %s needs values", t.key, t.op)
			}
		case meta.LabelSelectorOpExists, meta.LabelSelectorOpDoesNotExist:
			if len(values) != 0 {
				return out, "", fmt.Errorf("label %q: operator %s takes no values", t.key, t.op)
			}
		default:
			return out, "", fmt.Errorf("label %q: unknown operator %q", t.key, t.op)
		}
		out.terms = append(out.terms, t)
	}
	texts := make([]string, len(out.terms))
	for i, t := range out.terms {
		texts[i] = fmt.Sprintf("%q %s %q", t.key, t.op, t.values)
	}
	slices.Sort(texts)
	return out, "{" + strings.Join(slices.Compact(texts), ",") + "}", nil
}

func (s selector) matches(labels map[string]string) bool {
	for i := range s.terms {
		if !s.terms[i].matches(labels) {
			return false
		}
	}
	return true
}

func (t *term) matches(labels map[string]string) bool {
	value, has := labels[t.key]
	switch t.op {
	case meta.LabelSelectorOpExists:
		return has
	case meta.LabelSelectorOpDoesNotExist:
		return !has
	case meta.LabelSelectorOpNotIn:
		return !has || !slices.Contains(t.values, value)
	}
	return has && slices.Contains(t.values, value)
}
