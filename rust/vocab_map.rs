//! Maps between two vocabularies: equal bytes, longest prefixes.

use crate::encoding::Encoding;
use crate::pool;
use crate::table::{ByteTable, Sorted};

/// What the tokens of two vocabularies are to each other. -1: there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VocabMap {
    /// The student token with the same bytes, for every teacher token: of several the one that the student makes.
    pub teacher_to_student: Vec<i32>,
    /// The teacher token with the same bytes, for every student token.
    pub student_to_teacher: Vec<i32>,
    /// The longest student token that is a prefix of every teacher token.
    pub prefix: Vec<i32>,
    /// The first token of the student's own encoding of every teacher token. Where a word is taken to stand behind white
    /// space: -1 where that token would take a part of the word too.
    pub canonical: Vec<i32>,
    /// The first token of the teacher's own encoding of every student token.
    pub teacher_first: Vec<i32>,
    /// The second one, where there is one.
    pub teacher_second: Vec<i32>,
    /// The student's ids by bytes.
    pub student: Sorted,
    /// The teacher's ids by bytes.
    pub teacher: Sorted,
    /// Groups of teacher tokens without an equal student token, connected by being a prefix; -1 for all others.
    pub group: Vec<i32>,
}

impl VocabMap {
    /// The maps between the vocabularies of a student's and of a teacher's encoding.
    ///
    /// `pieces`: for every teacher token how many bytes the student's pre-tokenizer puts in one piece; empty: all.
    /// `letter`: what stands behind a teacher token of white space, if anything does.
    pub fn new(student: &Encoding, teacher: &Encoding, pieces: &[u32], letter: Option<u8>) -> Self {
        let (s, t) = (student.table(), teacher.table());
        let (canonical, teacher_first) = (student.first_of_all(t, pieces, letter), teacher.first_of_all(s, &[], None));
        let teacher_second = pool::map(s.len(), |id| {
            let bytes = s.bytes(id as u32);
            let first = u32::try_from(teacher_first[id]).map_or(bytes.len(), |first| t.bytes(first).len());
            // What is left of an encoding behind its first token is the encoding of what is left.
            let second = bytes.get(first..).filter(|rest| !rest.is_empty()).and_then(|rest| teacher.first(rest));
            second.map_or(-1, |id| id as i32)
        });
        let exact = |from: &ByteTable, to: &Encoding| -> Vec<i32> {
            pool::map(from.len(), |id| to.id(from.bytes(id as u32)).map_or(-1, |id| id as i32))
        };
        let (teacher_to_student, student_to_teacher) = (exact(t, student), exact(s, teacher));
        let prefix = pool::map(t.len(), |id| match teacher_to_student[id] {
            -1 => student.longest_prefix(t.bytes(id as u32)).map_or(-1, |id| id as i32),
            id => id,
        });
        let mut group = vec![-1; t.len()];
        let (mut groups, mut root) = (0, None);
        for &id in &teacher.sorted().order {
            if teacher_to_student[id as usize] >= 0 {
                continue;
            }
            let bytes = t.bytes(id as u32);
            // Sorted: whatever a root is a prefix of comes right after it.
            if !root.is_some_and(|root| bytes.starts_with(t.bytes(root))) {
                root = Some(id as u32);
                groups += 1;
            }
            group[id as usize] = groups - 1;
        }
        Self {
            teacher_to_student,
            student_to_teacher,
            prefix,
            canonical,
            teacher_first,
            teacher_second,
            student: student.sorted().clone(),
            teacher: teacher.sorted().clone(),
            group,
        }
    }
}
