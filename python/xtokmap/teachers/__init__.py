"""Who gives every teacher token its logprob: a model in this process, or one behind HTTP."""

from xtokmap.teachers.client import TeacherError
from xtokmap.teachers.head import read_head
from xtokmap.teachers.local import LocalTeacher, Teacher
from xtokmap.teachers.remote import ServerTeacher
from xtokmap.teachers.scores import Scores

__all__ = ["LocalTeacher", "Scores", "ServerTeacher", "Teacher", "TeacherError", "read_head"]
