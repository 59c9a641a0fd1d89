//! Answers that `/v1/responses` can go on from: in memory, bounded, the oldest is forgotten first.

use std::collections::{HashMap, VecDeque};

use antefix_models::template::Message;
use serde_json::Value;

/// Bytes of all remembered conversations together, and their number at most.
#[derive(Debug, Clone, Copy)]
pub struct RememberLimits {
    /// Bytes, as JSON.
    pub bytes: usize,
    /// Answers.
    pub answers: usize,
}

impl Default for RememberLimits {
    fn default() -> Self {
        Self {
            bytes: 64 << 20,
            answers: 4096,
        }
    }
}

/// One answer and the conversation up to and with it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Number of the tenant whose it is.
    pub(crate) tenant: u64,
    /// Without `instructions`: those hold for one answer.
    pub(crate) conversation: Vec<Message>,
    /// As it was sent.
    pub(crate) response: Value,
}

impl Entry {
    fn bytes(&self) -> usize {
        let message = |m: &Message| {
            let extra: usize = m.extra.iter().map(|(k, v)| k.len() + v.to_string().len()).sum();
            m.role.len() + m.content.len() + extra
        };
        self.conversation.iter().map(message).sum::<usize>() + self.response.to_string().len()
    }
}

/// The store.
#[derive(Debug, Default)]
pub(crate) struct Remembered {
    limits: RememberLimits,
    entries: HashMap<String, (usize, Entry)>,
    /// Oldest first; may hold ids that were removed.
    order: VecDeque<String>,
    bytes: usize,
}

impl Remembered {
    pub(crate) fn new(limits: RememberLimits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// Keeps `entry`, at the cost of the oldest; one that is larger than everything may be is not kept.
    pub(crate) fn insert(&mut self, id: String, entry: Entry) {
        let bytes = entry.bytes();
        if bytes > self.limits.bytes || self.limits.answers == 0 {
            return;
        }
        while self.bytes + bytes > self.limits.bytes || self.entries.len() >= self.limits.answers {
            let Some(oldest) = self.order.pop_front() else {
                break;
            };
            self.drop_entry(&oldest);
        }
        self.bytes += bytes;
        self.order.push_back(id.clone());
        self.entries.insert(id, (bytes, entry));
    }

    /// `tenant`'s answer; those of others are not there for it.
    pub(crate) fn get(&self, id: &str, tenant: u64) -> Option<&Entry> {
        let (_, entry) = self.entries.get(id)?;
        (entry.tenant == tenant).then_some(entry)
    }

    /// Forgets `tenant`'s answer; false when there is none.
    pub(crate) fn remove(&mut self, id: &str, tenant: u64) -> bool {
        let there = self.get(id, tenant).is_some();
        if there {
            self.drop_entry(id);
            self.order.retain(|other| other != id);
        }
        there
    }

    fn drop_entry(&mut self, id: &str) {
        if let Some((bytes, _)) = self.entries.remove(id) {
            self.bytes -= bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tenant: u64, text: &str) -> Entry {
        Entry {
            tenant,
            conversation: vec![Message::new("user", text)],
            response: Value::Null,
        }
    }

    #[test]
    fn the_oldest_is_forgotten_and_nobody_sees_another_s() {
        let mut r = Remembered::new(RememberLimits {
            bytes: 1000,
            answers: 2,
        });
        r.insert("a".into(), entry(1, "x"));
        r.insert("b".into(), entry(1, "y"));
        assert!(r.get("a", 1).is_some() && r.get("a", 2).is_none());
        r.insert("c".into(), entry(2, "z"));
        assert!(r.get("a", 1).is_none() && r.get("b", 1).is_some());
        assert!(!r.remove("c", 1) && r.remove("c", 2) && !r.remove("c", 2));
        r.insert("d".into(), entry(1, &"x".repeat(2000)));
        assert!(
            r.get("d", 1).is_none() && r.get("b", 1).is_some(),
            "too large to keep"
        );
        r.insert("e".into(), entry(1, &"x".repeat(992)));
        assert!(
            r.get("b", 1).is_none() && r.get("e", 1).is_some(),
            "bytes count, too"
        );
        assert!(r.remove("e", 1));
        assert_eq!((r.bytes, r.order.len()), (0, 0));
    }
}
