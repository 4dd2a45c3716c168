//! Encoding rules, vocabulary maps and cover queries against naive forms of themselves.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use xtokmap::{
    Aligner, Batch, Behind, ByteTable, Cover, Encoding, Ids, Layout, Of, Queries, Rows, Rule, Sorted, Splits, VocabMap,
};

type Bytes = Vec<u8>;

fn table(tokens: &[Bytes]) -> ByteTable {
    // A token without bytes is a special one.
    ByteTable::from_tokens(tokens.iter().map(|t| (!t.is_empty()).then_some(t))).unwrap()
}

// ---- rules, naively ---------------------------------------------------------------------------------------------

/// Byte-pair encoding as its definition has it: look at all neighbors, merge the best pair, look again.
#[derive(Clone, Debug, Default)]
struct Bpe {
    tokens: Vec<Bytes>,
    /// (left, right, merged), the best first; `None`: any two tokens that are a token together, of lowest rank.
    merges: Option<Vec<[u32; 3]>>,
    ranks: Option<Vec<u32>>,
    characters: bool,
    whole: bool,
    added: Vec<u32>,
}

impl Bpe {
    fn encoding(&self) -> Encoding {
        let Self { merges, ranks, characters, whole, added, .. } = self.clone();
        Encoding::new(table(&self.tokens), Rule::Bpe { merges, ranks, characters, whole, added }, None).unwrap()
    }

    fn id(&self, bytes: &[u8]) -> Option<u32> {
        let equal = (0..self.tokens.len() as u32).filter(|&id| !bytes.is_empty() && self.tokens[id as usize] == bytes);
        // An added token is found first. A character that is listed after the byte piece with the same bytes is what
        // is made.
        equal.max_by_key(|id| (self.added.contains(id), if self.characters { i64::from(*id) } else { -i64::from(*id) }))
    }

    fn symbols(&self, bytes: &[u8]) -> Vec<u32> {
        let mut symbols = vec![];
        let mut at = 0;
        while at < bytes.len() {
            let width = (1..=4.min(bytes.len() - at))
                .find(|&n| std::str::from_utf8(&bytes[at..at + n]).is_ok_and(|text| text.chars().count() == 1))
                .filter(|_| self.characters)
                .unwrap_or(1);
            match self.id(&bytes[at..at + width]) {
                Some(id) => symbols.push(id),
                None => symbols.extend((at..at + width).filter_map(|k| self.id(&bytes[k..=k]))),
            }
            at += width;
        }
        symbols
    }

    /// Rank and product of a pair.
    fn merge(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        if let Some(merges) = &self.merges {
            let rank = merges.iter().position(|m| m[..2] == [left, right])?;
            return Some((rank as u32, merges[rank][2]));
        }
        let both = [&self.tokens[left as usize][..], &self.tokens[right as usize]].concat();
        let id = self.id(&both)?;
        Some((self.ranks.as_ref().map_or(id, |ranks| ranks[id as usize]), id))
    }

    fn piece(&self, bytes: &[u8]) -> Vec<u32> {
        if let Some(id) = self.id(bytes).filter(|_| self.whole) {
            return vec![id];
        }
        let mut symbols = self.symbols(bytes);
        loop {
            let pairs = (1..symbols.len()).filter_map(|k| {
                let (rank, merged) = self.merge(symbols[k - 1], symbols[k])?;
                Some((rank, k, merged))
            });
            let Some((_, k, merged)) = pairs.min() else { return symbols };
            symbols.splice(k - 1..=k, [merged]);
        }
    }

    fn encode(&self, bytes: &[u8]) -> Vec<u32> {
        let (mut all, mut from, mut at) = (vec![], 0, 0);
        while at < bytes.len() {
            let fitting = self.added.iter().filter(|&&id| bytes[at..].starts_with(&self.tokens[id as usize]));
            match fitting.max_by_key(|&&id| self.tokens[id as usize].len()) {
                Some(&id) => {
                    all.extend(self.piece(&bytes[from..at]));
                    all.push(id);
                    at += self.tokens[id as usize].len();
                    from = at;
                }
                None => at += 1,
            }
        }
        if from < bytes.len() {
            all.extend(self.piece(&bytes[from..]));
        }
        all
    }

    fn makes(&self, id: u32) -> bool {
        !self.tokens[id as usize].is_empty() && self.encode(&self.tokens[id as usize]) == [id]
    }
}

fn longest_match(tokens: &[Bytes], bytes: &[u8]) -> Vec<u32> {
    let (mut all, mut at) = (vec![], 0);
    while at < bytes.len() {
        match longest_prefix(tokens, &bytes[at..]) {
            Some(id) => {
                at += tokens[id as usize].len();
                all.push(id);
            }
            None => at += 1,
        }
    }
    all
}

fn longest_prefix(tokens: &[Bytes], bytes: &[u8]) -> Option<u32> {
    let fitting = (0..tokens.len()).filter(|&id| !tokens[id].is_empty() && bytes.starts_with(&tokens[id]));
    fitting.max_by_key(|&id| (tokens[id].len(), std::cmp::Reverse(id))).map(|id| id as u32)
}

/// Every way to cut the bytes into tokens, with its sum of scores; a byte that no token has costs 10000.
fn paths(tokens: &[Bytes], scores: &[f32], bytes: &[u8]) -> Vec<(f32, Vec<u32>)> {
    if bytes.is_empty() {
        return vec![(0.0, vec![])];
    }
    let mut all = vec![];
    for (id, token) in tokens.iter().enumerate().filter(|(_, t)| !t.is_empty() && bytes.starts_with(t)) {
        all.extend(paths(tokens, scores, &bytes[token.len()..]).into_iter().map(|(sum, mut path)| {
            path.insert(0, id as u32);
            (sum + scores[id], path)
        }));
    }
    all.extend(paths(tokens, scores, &bytes[1..]).into_iter().map(|(sum, path)| (sum - 1e4, path)));
    all
}

// ---- strategies --------------------------------------------------------------------------------------------------

fn text(alphabet: &'static [&'static str], len: std::ops::Range<usize>) -> impl Strategy<Value = Bytes> {
    prop::collection::vec(prop::sample::select(alphabet), len).prop_map(|parts| parts.concat().into_bytes())
}

const LETTERS: &[&str] = &["a", "b", "c"];
const CHARACTERS: &[&str] = &["a", "b", "é", "è", "ж"];

fn is_text(token: &[u8]) -> bool {
    std::str::from_utf8(token).is_ok()
}

/// A vocabulary with merges that were trained on a text: each is of a pair that stood there when it was made.
fn train(text: &[u8], picks: &[u16], characters: bool) -> Bpe {
    let mut bpe = Bpe { merges: Some(vec![]), characters, ..Bpe::default() };
    bpe.tokens.push(vec![]);
    let mut first: Vec<Bytes> = vec![];
    if characters {
        // Byte pieces, among them of bytes that are characters too.
        first.extend([0x61, 0xC3, 0xA9, 0xA8, 0xD0, 0xB6].map(|byte| vec![byte]));
        first.extend(["a", "b", "é"].map(|c| c.as_bytes().to_vec()));
    } else {
        first.extend(b"abc".iter().map(|&byte| vec![byte]));
    }
    bpe.tokens.extend(first);
    let mut corpus = bpe.symbols(text);
    for &pick in picks {
        let mut pairs: Vec<(u32, u32)> = corpus.windows(2).map(|w| (w[0], w[1])).collect();
        pairs.sort_unstable();
        pairs.dedup();
        // Byte pieces stand for themselves.
        pairs.retain(|&(left, right)| is_text(&bpe.tokens[left as usize]) && is_text(&bpe.tokens[right as usize]));
        let Some(&(left, right)) = pairs.get(pick as usize % pairs.len().max(1)) else { break };
        let both = [&bpe.tokens[left as usize][..], &bpe.tokens[right as usize]].concat();
        let merged = bpe.tokens.iter().position(|t| *t == both).unwrap_or(bpe.tokens.len()) as u32;
        if merged as usize == bpe.tokens.len() {
            bpe.tokens.push(both);
        }
        bpe.merges.as_mut().unwrap().push([left, right, merged]);
        let mut k = 1;
        while k < corpus.len() {
            if (corpus[k - 1], corpus[k]) == (left, right) {
                corpus.splice(k - 1..=k, [merged]);
            }
            k += 1;
        }
    }
    bpe
}

fn trained() -> impl Strategy<Value = Bpe> {
    let letters = (text(LETTERS, 2..60), prop::collection::vec(any::<u16>(), 0..24), Just(false));
    let characters = (text(CHARACTERS, 2..60), prop::collection::vec(any::<u16>(), 0..24), Just(true));
    prop_oneof![letters, characters].prop_map(|(text, picks, characters)| train(&text, &picks, characters))
}

/// The same with what else a tokenizer may have: whole pieces, added tokens, merges that follow from the ranks.
fn any_bpe() -> impl Strategy<Value = Bpe> {
    let added = prop::collection::vec(any::<u16>(), 0..3);
    (trained(), any::<bool>(), added, 0..3, any::<u32>()).prop_map(|(mut bpe, whole, added, implied, seed)| {
        bpe.whole = whole;
        bpe.added = added.iter().map(|&k| 1 + u32::from(k) % (bpe.tokens.len() as u32 - 1)).collect();
        // Text is added, not half a character.
        bpe.added.retain(|&id| is_text(&bpe.tokens[id as usize]));
        bpe.added.sort_unstable_by_key(|&id| &bpe.tokens[id as usize]);
        bpe.added.dedup_by_key(|id| &bpe.tokens[*id as usize]);
        if implied > 0 {
            bpe.merges = None;
        }
        if implied == 2 {
            let n = bpe.tokens.len() as u32;
            // What is made later ranks later, as training has it; ranks need not be without gaps.
            bpe.ranks = Some((0..n).map(|id| id * (1 + seed % 7)).collect());
        }
        bpe
    })
}

/// Distinct tokens over the letters, every letter among them, and a special token.
fn vocabulary() -> impl Strategy<Value = Vec<Bytes>> {
    prop::collection::vec(text(LETTERS, 1..5), 0..14).prop_map(|mut tokens| {
        tokens.extend([vec![], b"a".to_vec(), b"b".to_vec(), b"c".to_vec()]);
        let mut seen: Vec<Bytes> = vec![];
        tokens.retain(|t| !seen.contains(t) && (seen.push(t.clone()), true).1);
        tokens
    })
}

/// Any tokens: equal ones, special ones, none, and letters that no token has.
fn loose() -> impl Strategy<Value = Vec<Bytes>> {
    prop::collection::vec(text(LETTERS, 0..4), 0..16)
}

// ---- laws --------------------------------------------------------------------------------------------------------

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sorted_is_what_sorting_gives(tokens in loose(), prefix in text(LETTERS, 0..4)) {
        let byte_table = table(&tokens);
        let sorted = Sorted::new(&byte_table);
        let mut order: Vec<i32> = (0..tokens.len() as i32).filter(|&id| !tokens[id as usize].is_empty()).collect();
        order.sort_by_key(|&id| (&tokens[id as usize], id));
        prop_assert_eq!(&sorted.order, &order);
        let range = |prefix: &[u8]| {
            let within = |&id: &i32| tokens[id as usize].starts_with(prefix);
            let lo = order.iter().position(within);
            lo.map(|lo| [lo, lo + order[lo..].iter().take_while(|&id| within(id)).count()])
        };
        for (id, token) in tokens.iter().enumerate() {
            let expected = if token.is_empty() { [0, 0] } else { range(token).unwrap() };
            prop_assert_eq!(sorted.range[id].map(|at| at as usize), expected);
        }
        let found = sorted.prefix_range(&byte_table, &prefix);
        prop_assert_eq!(range(&prefix).unwrap_or([found[0], found[0]]), found);
    }

    #[test]
    fn vocabulary_maps_are_what_looking_at_every_pair_gives(student in loose(), teacher in loose()) {
        let encodings = [&student, &teacher].map(|t| Encoding::new(table(t), Rule::LongestMatch, None).unwrap());
        let map = VocabMap::new(&encodings[0], &encodings[1], &[], None);
        let number = |id: Option<u32>| id.map_or(-1, |id| id as i32);
        let equal = |tokens: &[Bytes], bytes: &[u8]| {
            number((0..tokens.len() as u32).find(|&id| !bytes.is_empty() && tokens[id as usize] == bytes))
        };
        let each = |tokens: &[Bytes], f: &dyn Fn(&[u8]) -> i32| tokens.iter().map(|t| f(t)).collect::<Vec<_>>();
        prop_assert_eq!(&map.teacher_to_student, &each(&teacher, &|t| equal(&student, t)));
        prop_assert_eq!(&map.student_to_teacher, &each(&student, &|t| equal(&teacher, t)));
        prop_assert_eq!(&map.prefix, &each(&teacher, &|t| number(longest_prefix(&student, t))));
        prop_assert_eq!(&map.canonical, &map.prefix);
        prop_assert_eq!(&map.teacher_first, &each(&student, &|t| number(longest_prefix(&teacher, t))));
        prop_assert_eq!(&map.student, &Sorted::new(&table(&student)));
        // Two tokens are in one group if and only if a chain of prefixes connects them.
        let own: Vec<usize> = (0..teacher.len()).filter(|&v| !teacher[v].is_empty() && !student.contains(&teacher[v])).collect();
        let mut root: Vec<usize> = (0..teacher.len()).collect();
        for _ in &own {
            for (&v, &w) in own.iter().flat_map(|v| own.iter().map(move |w| (v, w))) {
                if teacher[w].starts_with(&teacher[v]) {
                    let least = root[v].min(root[w]);
                    (root[v], root[w]) = (least, least);
                }
            }
        }
        for v in 0..teacher.len() {
            prop_assert_eq!(map.group[v] >= 0, own.contains(&v));
            for &w in own.iter().filter(|_| own.contains(&v)) {
                prop_assert_eq!(map.group[v] == map.group[w], root[v] == root[w]);
            }
        }
        let groups = map.group.iter().max().map_or(0, |g| g + 1);
        prop_assert!((0..groups).all(|g| map.group.contains(&g)));
    }

    #[test]
    fn canonical_is_the_first_token_of_the_encoding(bpe in any_bpe(), teacher in loose(), pieces in any::<[u8; 16]>()) {
        let encoding = bpe.encoding();
        let others = Encoding::new(table(&teacher), Rule::LongestMatch, None).unwrap();
        let pieces: Vec<u32> = teacher.iter().zip(pieces).map(|(_, n)| 1 + u32::from(n) % 4).collect();
        let (plain, cut) = (VocabMap::new(&encoding, &others, &[], None), VocabMap::new(&encoding, &others, &pieces, None));
        for (v, token) in teacher.iter().enumerate() {
            let first = |bytes: &[u8]| bpe.encode(bytes).first().map_or(-1, |&id| id as i32);
            prop_assert_eq!(plain.canonical[v], first(token));
            prop_assert_eq!(cut.canonical[v], first(&token[..token.len().min(pieces[v] as usize)]));
            let equal = (!token.is_empty()).then(|| bpe.id(token)).flatten();
            prop_assert_eq!(plain.teacher_to_student[v], equal.map_or(-1, |id| id as i32));
        }
    }

    #[test]
    fn bpe_encodes_as_it_is_defined(bpe in any_bpe(), one in text(LETTERS, 0..12), other in text(CHARACTERS, 0..12)) {
        let encoding = bpe.encoding();
        for bytes in [&one, &other, &other[1.min(other.len())..].to_vec()] {
            prop_assert_eq!(encoding.encode(bytes), bpe.encode(bytes));
            prop_assert_eq!(encoding.first(bytes), bpe.encode(bytes).first().copied());
        }
        for token in &bpe.tokens {
            prop_assert_eq!(encoding.id(token), bpe.id(token).filter(|_| !token.is_empty()));
        }
    }

    #[test]
    fn longest_match_encodes_as_it_is_defined(tokens in loose(), bytes in text(LETTERS, 0..12)) {
        let encoding = Encoding::new(table(&tokens), Rule::LongestMatch, None).unwrap();
        prop_assert_eq!(encoding.encode(&bytes), longest_match(&tokens, &bytes));
        prop_assert_eq!(encoding.longest_prefix(&bytes), longest_prefix(&tokens, &bytes));
    }

    #[test]
    fn unigram_takes_a_best_path(tokens in loose(), scores in prop::collection::vec(-20i8..0, 16), bytes in text(LETTERS, 0..8)) {
        let scores: Vec<f32> = scores.iter().take(tokens.len()).map(|&score| f32::from(score)).collect();
        let encoding = Encoding::new(table(&tokens), Rule::Unigram(scores.clone()), None).unwrap();
        let path = encoding.encode(&bytes);
        let all = paths(&tokens, &scores, &bytes);
        let best = all.iter().map(|p| p.0).fold(f32::NEG_INFINITY, f32::max);
        prop_assert!(all.iter().any(|(sum, other)| sum.total_cmp(&best).is_eq() && *other == path), "{path:?}");
    }

    /// Two tokens that a tokenizer makes stand side by side if and only if their bytes together are encoded so.
    #[test]
    fn bpe_neighbours_are_joined_if_their_bytes_are_encoded_otherwise(bpe in any_bpe()) {
        let encoding = bpe.encoding();
        // Byte pieces that are a character together are not seen: that can take more than two.
        let ids: Vec<u32> = (0..bpe.tokens.len() as u32).filter(|&id| is_text(&bpe.tokens[id as usize])).collect();
        let ids = ids.into_iter();
        for s in ids.clone().filter(|&s| bpe.makes(s)) {
            for u in ids.clone().filter(|&u| bpe.makes(u)) {
                let both = [&bpe.tokens[s as usize][..], &bpe.tokens[u as usize]].concat();
                prop_assert_eq!(encoding.joined(s, u, Behind::Nothing), bpe.encode(&both)[0] != s, "{} {}", s, u);
            }
        }
        // What the rule never makes is never right beside another token.
        for s in ids.clone().filter(|&s| !bpe.tokens[s as usize].is_empty() && !bpe.makes(s)) {
            for u in ids.clone().filter(|&u| bpe.makes(u)) {
                let both = [&bpe.tokens[s as usize][..], &bpe.tokens[u as usize]].concat();
                prop_assert!(encoding.joined(s, u, Behind::Nothing) || bpe.encode(&both)[0] == s, "{} {}", s, u);
            }
        }
    }

    /// The set of all tokens that would have merged is found from trees, and by asking of each.
    #[test]
    fn what_merges_is_what_is_joined(
        bpe in any_bpe(), splits in any::<[u8; 24]>(), use_splits in any::<bool>(), spaces in any::<bool>(),
    ) {
        let mut bpe = bpe;
        let v = bpe.tokens.len();
        // With white space, of which a word behind it says how it is cut.
        let letter = spaces.then_some(b'a');
        bpe.tokens.iter_mut().flatten().filter(|byte| spaces && **byte == b'b').for_each(|byte| *byte = b' ');
        let mut encoding = bpe.encoding();
        if use_splits {
            let class = |k: usize, n: u8| u32::from(splits[k % 24] >> 2) % u32::from(n);
            let splits_of = Splits {
                before: (0..v).map(|id| class(id, 3)).collect(),
                after: (0..v).map(|id| class(id + 7, 4)).collect(),
                reach: vec![OnceLock::new(); 3],
                width: 4,
            };
            let Bpe { merges, ranks, characters, whole, added, .. } = bpe.clone();
            let rule = Rule::Bpe { merges, ranks, characters, whole, added };
            encoding = Encoding::new(table(&bpe.tokens), rule, Some(splits_of)).unwrap();
            for c in 0..3 {
                let values = [0, 1, Splits::INSIDE, Splits::ALL, Splits::ALL_BUT_LAST];
                let reach = (0..8).map(|k| values[splits[(c * 4 + 5 * k) % 24] as usize % 5]);
                encoding.learn(c, reach.collect()).unwrap();
            }
        }
        let teacher = Encoding::new(table(&bpe.tokens), Rule::LongestMatch, None).unwrap();
        let (student, teacher) = (Arc::new(encoding), Arc::new(teacher));
        let map = Arc::new(VocabMap::new(&student, &teacher, &[], letter));
        let cover = Cover::new(student.clone(), teacher.clone(), map.clone(), letter);
        for s in (0..v as u32).filter(|&s| !bpe.tokens[s as usize].is_empty()) {
            let batch = one_row(&student, &teacher, &[s], &[s]);
            let found = cover.queries(&batch, &[s], &[s], Of::Tokens).unwrap();
            let after = found.sets.iter().find(|set| set.complement).unwrap();
            let merges = |&v: &i32| {
                let bytes = &bpe.tokens[v as usize];
                let next = u32::try_from(map.canonical[v as usize]).ok();
                if letter.is_some() && !bytes.is_empty() && bytes.iter().all(|&byte| byte == b' ') {
                    let whole = student.id(bytes).filter(|_| use_splits).or(next);
                    return whole.is_some_and(|u| student.joined(s, u, Behind::Word));
                }
                next.is_some_and(|u| student.joined(s, u, Behind::Nothing))
            };
            let expected: Vec<i32> = (0..v as i32).filter(merges).collect();
            prop_assert_eq!(&after.ids, &expected, "{}", s);
        }
    }

    /// Section "cover" of the method, token by token, from a look at the whole vocabulary.
    #[test]
    fn queries_are_what_the_definition_says(
        rule in 0..3, bpe in trained(), other in vocabulary(), teacher in vocabulary(), bytes in text(LETTERS, 1..14),
        cuts in prop::collection::vec(any::<u16>(), 0..14), own in any::<bool>(), picks in any::<[u16; 14]>(),
    ) {
        let letters = Bpe { characters: false, ..train(&bpe.tokens.concat().iter().map(|b| b"abc"[*b as usize % 3]).collect::<Vec<_>>(), &picks, false) };
        let scores: Vec<f32> = (0..other.len()).map(|id| -1.0 - f32::from((id * 7919 % 1013) as u16) / 100.0).collect();
        let (tokens, student) = match rule {
            0 => (other.clone(), Encoding::new(table(&other), Rule::LongestMatch, None).unwrap()),
            1 => (letters.tokens.clone(), letters.encoding()),
            _ => (other.clone(), Encoding::new(table(&other), Rule::Unigram(scores.clone()), None).unwrap()),
        };
        // The student's tokens are drawn, the teacher's are an encoding of the same bytes.
        let mut students = vec![];
        let mut at = 0;
        for &cut in cuts.iter().cycle().take(if cuts.is_empty() { 0 } else { bytes.len() }) {
            let fitting: Vec<u32> = (0..tokens.len() as u32)
                .filter(|&id| !tokens[id as usize].is_empty() && bytes[at..].starts_with(&tokens[id as usize]))
                .collect();
            let Some(&id) = fitting.get(cut as usize % fitting.len().max(1)) else { break };
            students.push(id);
            at += tokens[id as usize].len();
        }
        if own || at < bytes.len() {
            students = student.encode(&bytes);
        }
        let teachers = longest_match(&teacher, &bytes);
        let first = |bytes: &[u8]| student.encode(bytes).first().copied();
        let merges = |s: u32, z: &[u8]| {
            let both = [&tokens[s as usize][..], z].concat();
            rule == 1 && !letters.makes(s) || first(&both) != Some(s)
        };

        let teacher_encoding = Arc::new(Encoding::new(table(&teacher), Rule::LongestMatch, None).unwrap());
        let student = Arc::new(student.clone());
        let map = Arc::new(VocabMap::new(&student, &teacher_encoding, &[], None));
        let cover = Cover::new(student.clone(), teacher_encoding.clone(), map, None);
        prop_assume!(!cover.same());
        let batch = one_row(&student, &teacher_encoding, &students, &teachers);
        let found = cover.queries(&batch, &students, &teachers, Of::Rows).unwrap();

        let ends = |tokens: &[Bytes], ids: &[u32]| {
            let lengths = ids.iter().map(|&id| tokens[id as usize].len());
            lengths.scan(0, |end, len| { *end += len; Some(*end) }).collect::<Vec<usize>>()
        };
        let (student_ends, teacher_ends) = (ends(&tokens, &students), ends(&teacher, &teachers));
        for (i, &s) in students.iter().enumerate() {
            let b = student_ends[i];
            let j = teacher_ends.iter().position(|&end| end >= b).unwrap();
            let exact = teacher_ends[j] == b;
            let never = students.get(i + 1).is_some_and(|&next| merges(s, &tokens[next as usize]));
            let kept = |z: &[u8]| never || !merges(s, z);
            let mut terms: Vec<(i32, Vec<i32>, bool)> = vec![];
            let mut forced = vec![];
            for k in 0..=j {
                let consumed = &bytes[if k == 0 { 0 } else { teacher_ends[k - 1] }..b];
                let ids: Vec<i32> = (0..teacher.len() as i32)
                    .filter(|&v| match teacher[v as usize].strip_prefix(consumed) {
                        None => false,
                        Some([]) => k == j && !exact,
                        Some(z) => kept(z),
                    })
                    .collect();
                if k == j && !exact && !ids.contains(&(teachers[j] as i32)) {
                    forced.push((k as i32, teachers[j]));
                }
                if !ids.is_empty() {
                    terms.push((k as i32, ids, false));
                }
            }
            if exact {
                let merging: Vec<i32> =
                    (0..teacher.len() as i32).filter(|&v| !teacher[v as usize].is_empty() && !kept(&teacher[v as usize])).collect();
                if let Some(&next) = teachers.get(j + 1).filter(|&&next| merging.contains(&(next as i32))) {
                    forced.push((j as i32 + 1, next));
                }
                terms.push((j as i32 + 1, merging, true));
            }
            let own = found.indptr[i] as usize..found.indptr[i + 1] as usize;
            let of_sets = own.clone().filter(|&k| found.set[k] >= 0).map(|k| {
                let set = &found.sets[found.set[k] as usize];
                (found.row[k], set.ids.clone(), set.complement)
            });
            let single = own.clone().filter(|&k| found.set[k] < 0).map(|k| (found.row[k], (-1 - found.set[k]) as u32));
            prop_assert_eq!(of_sets.collect::<Vec<_>>(), terms, "token {} of {:?}", i, students);
            prop_assert_eq!(single.collect::<Vec<_>>(), forced.clone());
            prop_assert_eq!(found.base[i], if i == 0 { 0 } else { -1 });
            // Behind the teacher token with which it begins: what would merge with the student token that this is.
            let starts = |ends: &[usize], i: usize| if i == 0 { 0 } else { ends[i - 1] };
            let place = (0..teachers.len()).find(|&j| starts(&teacher_ends, j) == starts(&student_ends, i));
            let root = place.and_then(|j| {
                let own = &teacher[teachers[j] as usize];
                let root = (0..tokens.len() as u32).find(|&u| tokens[u as usize] == *own)?;
                let begins = |r: u32| longest_match(&teacher, &tokens[r as usize]).first() == Some(&teachers[j]);
                let longer = (0..tokens.len() as u32).any(|r| tokens[r as usize].len() > own.len() && begins(r));
                let here = s == root || !tokens[s as usize].is_empty() && begins(s);
                (longer && here && first(own) == Some(root)).then_some(root)
            });
            let behind = root.map_or(vec![], |root| {
                let both = |v: i32| [&tokens[root as usize][..], &teacher[v as usize]].concat();
                let changing = (0..teacher.len() as i32).filter(|&v| !teacher[v as usize].is_empty() && merges(root, &teacher[v as usize]));
                changing.map(|v| (v, first(&both(v)).map_or(-1, |u| u as i32))).collect::<Vec<_>>()
            });
            let shown = usize::try_from(found.within[i]).map_or(vec![], |set| {
                let set = &found.sets[set];
                set.ids.iter().copied().zip(set.next.iter().copied()).collect()
            });
            prop_assert_eq!(shown, behind, "behind token {} of {:?} and {:?}", i, students, teachers);
            prop_assert_eq!(found.flags[i] & Queries::NOT_CANONICAL > 0, never);
            prop_assert_eq!(found.flags[i] & Queries::FORCED > 0, !forced.is_empty());
            // What comes next in a set is the first token of what is left.
            for k in own.filter(|&k| found.set[k] >= 0 && !found.sets[found.set[k] as usize].complement) {
                let set = &found.sets[found.set[k] as usize];
                let row = found.row[k] as usize;
                let consumed = b - if row == 0 { 0 } else { teacher_ends[row - 1] };
                for (e, &v) in set.ids.iter().enumerate() {
                    let z = &teacher[v as usize][consumed..];
                    prop_assert_eq!(set.next[e], first(z).map_or(-1, |u| u as i32));
                    prop_assert_eq!(set.whole[e], first(z).is_some_and(|u| tokens[u as usize].len() == z.len()));
                }
            }
        }
    }

    #[test]
    fn a_batch_of_queries_is_its_rows(
        student in vocabulary(), teacher in vocabulary(), texts in prop::collection::vec(text(LETTERS, 0..14), 0..6), threads in 1usize..4,
    ) {
        let [s, t] = [&student, &teacher].map(|t| Arc::new(Encoding::new(table(t), Rule::LongestMatch, None).unwrap()));
        let map = Arc::new(VocabMap::new(&s, &t, &[], None));
        let rows: Vec<[Vec<u32>; 2]> = texts.iter().map(|x| [s.encode(x), t.encode(x)]).collect();
        let side = |k: usize| rows.iter().flat_map(|row| row[k].clone()).collect::<Vec<u32>>();
        let cu = |k: usize| {
            let mut cu = vec![0i64];
            cu.extend(rows.iter().scan(0, |n, row| { *n += row[k].len() as i64; Some(*n) }));
            cu
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let batch = align(&s, &t, (&side(0), &cu(0)), (&side(1), &cu(1)));
        let cover = Cover::new(s.clone(), t.clone(), map.clone(), None);
        let all = pool.install(|| cover.queries(&batch, &side(0), &side(1), Of::Rows).unwrap());
        // Asked again, when everything is known; from the start; and by one that keeps nothing.
        let fresh = || Cover::new(s.clone(), t.clone(), map.clone(), None);
        let forgetful = fresh().with_limit(0);
        for again in [&cover, &fresh(), &forgetful, &forgetful] {
            let found = again.queries(&batch, &side(0), &side(1), Of::Rows).unwrap();
            prop_assert_eq!(format!("{found:?}"), format!("{all:?}"));
            let inside = [again, &cover].map(|c| format!("{:?}", c.interior(&batch, &side(0), &side(1)).unwrap()));
            prop_assert_eq!(&inside[0], &inside[1]);
        }
        let mut at = 0;
        for [one, other] in &rows {
            let own = cover.queries(&one_row(&s, &t, one, other), one, other, Of::Tokens).unwrap();
            for i in 0..one.len() {
                prop_assert_eq!(terms(&own, i), terms(&all, at + i));
            }
            prop_assert_eq!(&own.base[..], &all.base[at..at + one.len()]);
            prop_assert_eq!(&own.flags[..], &all.flags[at..at + one.len()]);
            at += one.len();
        }
    }

    /// Nothing panics: what does not fit is an error, what fits has an answer.
    #[test]
    fn garbage_is_refused_or_answered(
        tokens in loose(), merges in prop::collection::vec(any::<[u8; 3]>(), 0..12), ranks in prop::collection::vec(any::<u32>(), 0..20),
        scores in prop::collection::vec(any::<f32>(), 0..20), listed in any::<bool>(), flags in any::<[bool; 3]>(),
        added in prop::collection::vec(0u32..20, 0..4), classes in prop::collection::vec(0u32..4, 0..40), ids in any::<[u8; 6]>(),
        reach in prop::collection::vec(any::<u8>(), 0..9), bytes in prop::collection::vec(any::<u8>(), 0..12), rule in 0..3,
    ) {
        let v = tokens.len();
        let splits = flags[2].then(|| Splits {
            before: classes.iter().copied().take(v).collect(),
            after: classes.iter().rev().copied().take(v).collect(),
            reach: vec![OnceLock::new(); 4],
            width: 4,
        });
        let rule = match rule {
            0 => Rule::LongestMatch,
            1 => Rule::Unigram(scores.iter().copied().chain(std::iter::repeat(f32::NAN)).take(if listed { v } else { scores.len() }).collect()),
            _ => Rule::Bpe {
                merges: listed.then(|| merges.iter().map(|m| m.map(|id| u32::from(id) % 18)).collect()),
                ranks: flags[2].then(|| ranks.iter().copied().cycle().take(if flags[0] { v } else { ranks.len() }).collect()),
                characters: flags[0],
                whole: flags[1],
                added,
            },
        };
        let Ok(student) = Encoding::new(table(&tokens), rule, splits) else { return Ok(()) };
        let _ = student.learn(ids[0] as usize % 5, reach);
        let mut other: Vec<Bytes> = tokens.iter().rev().cloned().collect();
        other.push(bytes.clone());
        let teacher = Encoding::new(table(&other), Rule::LongestMatch, None).unwrap();
        student.encode(&bytes);
        student.first(&bytes);
        student.longest_prefix(&bytes);
        for s in 0..v as u32 {
            student.merges(s, &bytes, None, Behind::Nothing);
            for u in 0..v as u32 {
                student.joined(s, u, Behind::Nothing);
                student.merges(s, &bytes, Some(u), Behind::Word);
            }
        }
        let (student, teacher) = (Arc::new(student), Arc::new(teacher));
        let letter = flags[1].then_some(b'a');
        let map = Arc::new(VocabMap::new(&student, &teacher, &[], letter));
        let cover = Cover::new(student.clone(), teacher.clone(), map, letter);
        if v > 0 {
            let [one, more] = [&ids[..3], &ids[3..]].map(|ids| ids.iter().map(|&id| u32::from(id) % v as u32).collect::<Vec<_>>());
            let batch = one_row(&student, &teacher, &one, &more);
            let found = cover.queries(&batch, &one, &more, Of::Tokens).unwrap();
            prop_assert_eq!(found.indptr.len(), 4);
            prop_assert_eq!(found.within, vec![-1; 3]);
            cover.queries(&batch, &one, &more, Of::Rows).unwrap();
            cover.interior(&batch, &one, &more).unwrap();
            cover.open();
            // A batch of other ids, and ids that no table has.
            prop_assert!(cover.queries(&batch, &one[..2], &more, Of::Tokens).is_err());
            prop_assert!(cover.queries(&batch, &[0, 0, v as u32], &more, Of::Tokens).is_err());
            prop_assert!(cover.interior(&batch, &one, &[0, 0, v as u32 + 1]).is_err());
            let mut odd = batch.clone();
            odd.student_cu = vec![0, 5, 3];
            prop_assert!(cover.queries(&odd, &one, &more, Of::Tokens).is_err());
            // Numbers of a batch that were changed by hand.
            let mut odd = batch;
            for numbers in [&mut odd.flat.teacher_pos, &mut odd.flat.teacher_off, &mut odd.flat.student_end,
                            &mut odd.flat.teacher_end, &mut odd.flat.student_chunk, &mut odd.flat.teacher_chunk] {
                for (number, change) in numbers.iter_mut().zip(&ids) {
                    *number = number.wrapping_add(i32::from(*change) - 128);
                }
            }
            let _ = cover.queries(&odd, &one, &more, Of::Rows);
            let _ = cover.interior(&odd, &one, &more);
        }
    }
}

fn align(student: &Encoding, teacher: &Encoding, s: (&[u32], &[i64]), t: (&[u32], &[i64])) -> Batch {
    let aligner = Aligner::new(student.table().clone(), teacher.table().clone()).unwrap();
    let rows = |(ids, cu)| Rows::new(Ids::U32(ids), Layout::Ragged(cu)).unwrap();
    aligner.align_batch(rows(s), rows(t), false).unwrap()
}

fn one_row(student: &Encoding, teacher: &Encoding, s: &[u32], t: &[u32]) -> Batch {
    align(student, teacher, (s, &[0, s.len() as i64]), (t, &[0, t.len() as i64]))
}

/// The terms of a student token: row, ids, complement.
fn terms(queries: &Queries, i: usize) -> Vec<(i32, Vec<i32>, bool)> {
    (queries.indptr[i] as usize..queries.indptr[i + 1] as usize)
        .map(|k| match usize::try_from(queries.set[k]) {
            Ok(set) => (queries.row[k], queries.sets[set].ids.clone(), queries.sets[set].complement),
            Err(_) => (queries.row[k], vec![queries.set[k]], false),
        })
        .collect()
}

#[test]
fn empty_tables_have_maps() {
    let none = || Encoding::new(table(&[]), Rule::LongestMatch, None).unwrap();
    let map = VocabMap::new(&none(), &none(), &[], None);
    assert_eq!(map, VocabMap::default());
    let one = Encoding::new(table(&[b"a".to_vec(), vec![]]), Rule::LongestMatch, None).unwrap();
    let map = VocabMap::new(&none(), &one, &[], None);
    assert_eq!((map.teacher_to_student, map.canonical, map.group), (vec![-1, -1], vec![-1, -1], vec![0, -1]));
    assert_eq!(map.teacher.range, [[0, 1], [0, 0]]);
}

#[test]
fn a_byte_piece_gives_way_to_its_character() {
    let tokens = ["a", "b", "a", "ab"].map(|t| t.as_bytes().to_vec());
    let rule =
        |characters| Rule::Bpe { merges: Some(vec![[2, 1, 3]]), ranks: None, characters, whole: false, added: vec![] };
    let encode = |characters| Encoding::new(table(&tokens), rule(characters), None).unwrap().encode(b"abb");
    assert_eq!(encode(true), [3, 1]);
    assert_eq!(encode(false), [0, 1, 1]);
}
